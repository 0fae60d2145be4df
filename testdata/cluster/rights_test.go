package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"net/url"
	"os"
	"reflect"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// token returns a token of the service account, as its pods get it.
func (e *environment) token(namespace, serviceAccount string) string {
	e.Helper()
	answer, err := cluster.client.CoreV1().ServiceAccounts(namespace).CreateToken(e.Context(), serviceAccount,
		&authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	e.check(err)
	return answer.Status.Token
}

// clientOf returns a client with the rights of a service account.
func (e *environment) clientOf(namespace, serviceAccount string) *kubernetes.Clientset {
	e.Helper()
	config := rest.AnonymousClientConfig(cluster.admin)
	config.BearerToken = e.token(namespace, serviceAccount)
	config.QPS = -1
	client, err := kubernetes.NewForConfig(config)
	e.check(err)
	return client
}

func TestServiceAccountMayPatchAndCreateItsSecretAndNothingElse(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.install()
		other := e.newNamespace()
		e.check(copySecret(e.Context(), e.secret(), e.namespace, "another"))
		e.check(copySecret(e.Context(), e.secret(), other, pullSecret))
		client := e.clientOf(e.namespace, fullname+"-serviceaccount")
		ctx := e.Context()

		type call struct {
			name    string
			allowed bool
			do      func() error
		}
		merge := func(namespace, name string) func() error {
			return func() error {
				_, err := client.CoreV1().Secrets(namespace).Patch(ctx, name, types.MergePatchType, []byte(`{}`), metav1.PatchOptions{})
				return err
			}
		}
		apply := func(namespace, name string) func() error {
			return func() error {
				body := []byte(`{"apiVersion":"v1","kind":"Secret","metadata":{"name":"` + name + `"},"type":"Opaque"}`)
				force := true
				_, err := client.CoreV1().Secrets(namespace).Patch(ctx, name, types.ApplyPatchType, body,
					metav1.PatchOptions{FieldManager: "test", Force: &force, DryRun: []string{metav1.DryRunAll}})
				return err
			}
		}
		calls := []call{
			{"merge patch of its Secret", true, merge(e.namespace, pullSecret)},
			{"merge patch of another", false, merge(e.namespace, "another")},
			{"merge patch of one that does not exist", false, merge(e.namespace, "missing")},
			{"merge patch in another namespace", false, merge(other, pullSecret)},
			{"apply of another", false, apply(e.namespace, "another")},
			{"apply of one that does not exist", false, apply(e.namespace, "missing")},
			{"apply in another namespace", false, apply(other, pullSecret)},
		}
		for _, s := range []struct{ namespace, name string }{{e.namespace, pullSecret}, {e.namespace, "another"}, {other, pullSecret}} {
			secrets := client.CoreV1().Secrets(s.namespace)
			at := " of " + s.namespace + "/" + s.name
			calls = append(calls,
				call{"get" + at, false, func() error { _, err := secrets.Get(ctx, s.name, metav1.GetOptions{}); return err }},
				call{"list" + at, false, func() error {
					_, err := secrets.List(ctx, metav1.SingleObject(metav1.ObjectMeta{Name: s.name}))
					return err
				}},
				call{"watch" + at, false, func() error {
					_, err := secrets.Watch(ctx, metav1.SingleObject(metav1.ObjectMeta{Name: s.name}))
					return err
				}},
				call{"update" + at, false, func() error {
					_, err := secrets.Update(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: s.name}}, metav1.UpdateOptions{})
					return err
				}},
				call{"delete" + at, false, func() error { return secrets.Delete(ctx, s.name, metav1.DeleteOptions{}) }},
				call{"delete of all" + at, false, func() error { return secrets.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}) }},
				call{"POST" + at, false, func() error {
					_, err := secrets.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: s.name}}, metav1.CreateOptions{})
					return err
				}},
			)
		}
		for _, c := range calls {
			if err := c.do(); c.allowed && err != nil || !c.allowed && !apierrors.IsForbidden(err) {
				e.Errorf("%s: allowed %t wanted, got %v", c.name, c.allowed, err)
			}
		}

		// The same by the authorizer's own word, over all resources: what the
		// account may do beyond any account without a Role is one rule.
		e.kubectl("create", "serviceaccount", "bare")
		want := []authorizationv1.ResourceRule{{
			Verbs: []string{"patch", "create"}, APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{pullSecret}}}
		bare := e.clientOf(e.namespace, "bare")
		for namespace, want := range map[string][]authorizationv1.ResourceRule{e.namespace: want, other: nil, "kube-system": nil} {
			if got := rulesBeyond(e, namespace, client, bare); !reflect.DeepEqual(got, want) {
				e.Errorf("rules in %s: %v, want %v", namespace, got, want)
			}
		}
	})
}

func copySecret(ctx context.Context, s *corev1.Secret, namespace, name string) error {
	_, err := cluster.client.CoreV1().Secrets(namespace).Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Type: s.Type, Data: s.Data}, metav1.CreateOptions{})
	return err
}

// rulesBeyond returns the rules that client has in the namespace and bare has not.
func rulesBeyond(e *environment, namespace string, client, bare *kubernetes.Clientset) []authorizationv1.ResourceRule {
	e.Helper()
	rules := func(c *kubernetes.Clientset) []authorizationv1.ResourceRule {
		review, err := c.AuthorizationV1().SelfSubjectRulesReviews().Create(e.Context(), &authorizationv1.SelfSubjectRulesReview{
			Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: namespace}}, metav1.CreateOptions{})
		e.check(err)
		if review.Status.Incomplete {
			e.Errorf("rules in %s are incomplete: %s", namespace, review.Status.EvaluationError)
		}
		return review.Status.ResourceRules
	}
	var beyond []authorizationv1.ResourceRule
	common := rules(bare)
next:
	for _, rule := range rules(client) {
		for _, c := range common {
			if reflect.DeepEqual(rule, c) {
				continue next
			}
		}
		beyond = append(beyond, rule)
	}
	return beyond
}

func TestAuditLogOfRunsHoldsOnlyPatchesOfTheOneSecret(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.install() // creates it
		e.mustRun() // patches it
		type request struct {
			verb, path string
			code       int32
		}
		var got []request
		for _, event := range e.auditEvents("system:serviceaccount:" + e.namespace + ":" + fullname + "-serviceaccount") {
			u, err := url.Parse(event.RequestURI)
			e.check(err)
			got = append(got, request{event.Verb, u.Path, event.ResponseStatus.Code})
		}
		path := "/api/v1/namespaces/" + e.namespace + "/secrets/" + pullSecret
		want := []request{{"patch", path, 404}, {"patch", path, 201}, {"patch", path, 200}}
		if !reflect.DeepEqual(got, want) {
			e.Errorf("requests %v, want %v", got, want)
		}
	})
}

// auditEvent is what the test reads of an audit.k8s.io/v1 Event.
type auditEvent struct {
	Verb, RequestURI string
	User             struct{ Username string }
	ResponseStatus   struct{ Code int32 }
}

// auditEvents returns all requests that user has made.
func (e *environment) auditEvents(user string) []auditEvent {
	e.Helper()
	f, err := os.Open(cluster.auditLog)
	e.check(err)
	defer f.Close()
	var events []auditEvent
	scanner := bufio.NewScanner(f)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		var event auditEvent
		if err := json.Unmarshal(scanner.Bytes(), &event); err != nil {
			break // the line that is being written
		}
		if event.User.Username == user {
			events = append(events, event)
		}
	}
	e.check(scanner.Err())
	return events
}
