package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"ecr-refresher/testdata/standin"
)

const (
	mergePatch = "application/merge-patch+json"
	applyPatch = "application/apply-patch+yaml"
	partial    = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"
)

// answer is what a server said to a request, and what the Secret was then.
type answer struct {
	Code     int
	Media    string
	Warnings []string
	Body     struct {
		Kind, APIVersion, Status, Message, Reason string
		Code                                      int
		Details                                   *metav1.StatusDetails
		Metadata                                  struct {
			Name, Namespace     string
			Labels, Annotations map[string]string
		}
	}
	Written bool // the Secret has another resourceVersion than before
	Secret  *corev1.Secret
}

func (a answer) String() string {
	b, _ := json.Marshal(a)
	return string(b)
}

// The stand-in for the API server is worth what it has in common with the real
// one: the same requests, on the same Secret, get the same answers from both
// and leave the same behind.
func TestStandInAnswersAsTheRealAPIServer(t *testing.T) {
	t.Parallel()
	const namespace, account = "conformance", "ecr-refresher"
	real := newRealServer(t, namespace, account)
	fake := newStandIn(t, namespace)

	typed := func(s string) string {
		return `{"type":"kubernetes.io/dockerconfigjson","data":{".dockerconfigjson":"` + s + `"}}`
	}
	b64 := base64.StdEncoding.EncodeToString
	good := typed(b64([]byte(`{"auths":{"host":{"auth":"QVdTOng="}}}`)))
	applied := func(name, rest string) string {
		return `{"apiVersion":"v1","kind":"Secret","metadata":{"name":"` + name + `"}` + rest + `}`
	}
	goodApply := applied("creds", `,"type":"kubernetes.io/dockerconfigjson","data":{".dockerconfigjson":"e30="}`)
	missing := func(s *corev1.Secret) *corev1.Secret { return nil }

	codes := make(map[int]bool)
	for _, c := range []struct {
		name   string
		live   func(*corev1.Secret) *corev1.Secret // makes the Secret from the usual one; nil: the usual one
		method string                              // PATCH if empty
		path   string                              // below the namespace; secrets/creds if empty
		query  string
		media  string // Content-Type; the merge patch's if empty, none if "-"
		accept string
		token  string // "-": none; the account's if empty
		body   string
	}{
		{name: "merge patch", body: good, query: "fieldManager=m&fieldValidation=Strict"},
		{name: "merge patch, metadata asked for", body: good, accept: partial},
		{name: "merge patch, media type with charset", body: good, media: mergePatch + "; charset=utf-8"},
		{name: "merge patch that changes nothing", body: `{}`},
		{name: "merge patch of metadata", body: `{"metadata":{"labels":{"team":null,"x":"y"},"annotations":{"a":"b"}}}`},
		{name: "merge patch that removes a key", body: `{"data":{"other":null}}`},
		{name: "merge patch by stringData", body: `{"stringData":{"other":"x"}}`},
		{name: "dry run", body: good, query: "dryRun=All"},
		{name: "dry run, unknown value", body: good, query: "dryRun=Some"},
		{name: "field validation, unknown value", body: good, query: "fieldValidation=Harsh"},
		{name: "force with a merge patch", body: good, query: "force=true"},
		{name: "field manager too long", body: good, query: "fieldManager=" + strings.Repeat("m", 129)},
		{name: "accepts HTML only", body: good, accept: "text/html"},
		{name: "accepts nothing in particular", body: good, accept: "*/*"},
		{name: "no content type", body: good, media: "-"},
		{name: "content type JSON", body: good, media: "application/json"},

		{name: "wrong type", live: func(s *corev1.Secret) *corev1.Secret { s.Type = corev1.SecretTypeOpaque; return s }, body: good},
		{name: "immutable", live: immutable, body: good},
		{name: "immutable and wrong type", live: func(s *corev1.Secret) *corev1.Secret {
			s.Type = corev1.SecretTypeOpaque
			return immutable(s)
		}, body: good},
		{name: "immutable, data the same", live: immutable, body: typed("e30=")},
		{name: "immutable taken back", live: immutable, body: `{"immutable":false}`},
		{name: "docker config is no JSON", body: typed(b64([]byte("no JSON")))},
		{name: "docker config is a list", body: typed(b64([]byte("[]")))},
		{name: "docker config is empty", body: typed("")},
		{name: "docker config is removed", body: `{"data":{".dockerconfigjson":null}}`},
		{name: "bad base64", body: typed("%%%")},
		{name: "data is a number", body: `{"data":{".dockerconfigjson":1}}`},
		{name: "data is a list", body: `{"data":[]}`},
		{name: "key with a slash", body: `{"data":{"a/b":"eA=="}}`},
		{name: "label with a bad value", body: `{"metadata":{"labels":{"a":"b c"}}}`},
		{name: "annotation with a bad key", body: `{"metadata":{"annotations":{"a b":"c"}}}`},
		{name: "more data than a Secret holds", body: `{"data":{"other":"` + b64(make([]byte, 1<<20)) + `"}}`},
		{name: "more than a request holds", body: `{"data":{"other":"` + strings.Repeat("A", 3<<20) + `"}}`},
		{name: "unknown field, strict", body: `{"dta":{}}`, query: "fieldValidation=Strict"},
		{name: "unknown fields, strict", body: `{"dta":{},"metadata":{"nam":"x"}}`, query: "fieldValidation=Strict"},
		{name: "unknown field, by default", body: `{"dta":{}}`},
		{name: "unknown field, warn", body: `{"dta":{}}`, query: "fieldValidation=Warn"},
		{name: "unknown field, ignore", body: `{"dta":{}}`, query: "fieldValidation=Ignore"},
		{name: "duplicate field, strict", body: `{"data":{"other":"eA==","other":"eQ=="}}`, query: "fieldValidation=Strict"},
		{name: "patch is no JSON", body: `{`},
		{name: "patch is a list", body: `[]`},
		{name: "patch is empty", body: ``},
		{name: "patch is null", body: `null`},
		{name: "another name", body: `{"metadata":{"name":"x"}}`},
		{name: "another namespace", body: `{"metadata":{"namespace":"x"}}`},
		{name: "another kind", body: `{"kind":"Sekret"}`},
		{name: "another version", body: `{"apiVersion":"v2"}`},
		{name: "stale resourceVersion", body: `{"metadata":{"resourceVersion":"1"}}`},
		{name: "another UID", body: `{"metadata":{"uid":"x"}}`},

		{name: "merge patch of a missing Secret", live: missing, body: good},
		{name: "apply of a missing Secret", live: missing, media: applyPatch, body: goodApply, query: "fieldManager=m&fieldValidation=Strict"},
		{name: "apply of a missing Secret, metadata asked for", live: missing, media: applyPatch, body: goodApply, query: "fieldManager=m", accept: partial},
		{name: "apply of a missing Secret, dry run", live: missing, media: applyPatch, body: goodApply, query: "fieldManager=m&dryRun=All"},
		{name: "apply of a missing Secret without a type", live: missing, media: applyPatch, body: applied("creds", ""), query: "fieldManager=m"},
		{name: "apply of a missing Secret, docker config is no JSON", live: missing, media: applyPatch,
			body: applied("creds", `,"type":"kubernetes.io/dockerconfigjson","data":{".dockerconfigjson":"eA=="}`), query: "fieldManager=m"},
		{name: "apply of a missing Secret without docker config", live: missing, media: applyPatch,
			body: applied("creds", `,"type":"kubernetes.io/dockerconfigjson"`), query: "fieldManager=m"},
		{name: "apply that conflicts", media: applyPatch, body: goodApply[:len(goodApply)-2] + `,"other":"eA=="}}`, query: "fieldManager=m"},
		{name: "apply that conflicts twice", media: applyPatch, query: "fieldManager=m",
			body: strings.Replace(goodApply, "e30=", b64([]byte(`{"auths":{}}`)), 1)[:len(goodApply)+10] + `,"other":"eA=="}}`},
		{name: "apply by force", media: applyPatch, body: goodApply[:len(goodApply)-2] + `,"other":"eA=="}}`, query: "fieldManager=m&force=true"},
		{name: "apply of the same values", media: applyPatch, body: goodApply, query: "fieldManager=m"},
		{name: "apply without a field manager", media: applyPatch, body: goodApply},
		{name: "apply of another name", media: applyPatch, body: applied("x", ""), query: "fieldManager=m"},
		{name: "apply without a name", live: missing, media: applyPatch, body: `{"apiVersion":"v1","kind":"Secret"}`, query: "fieldManager=m"},
		{name: "apply of another kind", media: applyPatch, body: strings.Replace(goodApply, "Secret", "ConfigMap", 1), query: "fieldManager=m"},
		{name: "apply of another version", media: applyPatch, body: strings.Replace(goodApply, "v1", "v2", 1), query: "fieldManager=m"},
		{name: "apply without a version", media: applyPatch, body: `{"kind":"Secret","metadata":{"name":"creds"}}`, query: "fieldManager=m"},
		{name: "apply without a kind", media: applyPatch, body: `{"apiVersion":"v1","metadata":{"name":"creds"}}`, query: "fieldManager=m"},
		{name: "apply with an unknown field", media: applyPatch, body: applied("creds", `,"dta":{}`), query: "fieldManager=m"},
		{name: "apply of a list", media: applyPatch, body: `[]`, query: "fieldManager=m"},
		{name: "apply of nothing", media: applyPatch, body: ``, query: "fieldManager=m"},
		{name: "apply of bad base64", live: missing, media: applyPatch, body: applied("creds", `,"data":{"other":"%%%"}`), query: "fieldManager=m"},
		{name: "apply of another type", live: func(s *corev1.Secret) *corev1.Secret { s.Type = corev1.SecretTypeOpaque; return s },
			media: applyPatch, body: goodApply, query: "fieldManager=m&force=true"},
		{name: "apply of an immutable Secret", live: immutable, media: applyPatch, query: "fieldManager=m&force=true", body: goodApply[:len(goodApply)-2] + `,"other":"eA=="}}`},

		{name: "wrong token", body: good, token: "wrong"},
		{name: "no token", body: good, token: "-"},
		{name: "merge patch of a Secret not allowed", body: good, path: "secrets/another"},
		{name: "apply of a Secret not allowed", media: applyPatch, body: applied("another", ""), path: "secrets/another", query: "fieldManager=m"},
		{name: "apply of a missing Secret that may only be patched", media: applyPatch, body: applied("patch-only", ""), path: "secrets/patch-only", query: "fieldManager=m"},
		{name: "merge patch of a missing Secret that may only be patched", body: good, path: "secrets/patch-only"},
		{name: "get", method: "GET", media: "-"},
		{name: "list", method: "GET", media: "-", path: "secrets"},
		{name: "update", method: "PUT", media: "application/json", body: goodApply},
		{name: "delete", method: "DELETE", media: "-"},
		{name: "delete of all", method: "DELETE", media: "-", path: "secrets"},
		{name: "POST", method: "POST", media: "application/json", body: goodApply, path: "secrets"},
		{name: "merge patch in a namespace not allowed", body: good, path: "../default/secrets/creds"},
		{name: "merge patch in a missing namespace", body: good, path: "../missing/secrets/nowhere"},
		{name: "apply in a missing namespace", media: applyPatch, body: applied("nowhere", ""), path: "../missing/secrets/nowhere", query: "fieldManager=m"},
		{name: "another path", body: good, path: "../../../../other"},
	} {
		t.Run(strings.NewReplacer(" ", "-", ",", "").Replace(c.name), func(t *testing.T) {
			live := &corev1.Secret{
				TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
				ObjectMeta: metav1.ObjectMeta{
					Name: "creds", Labels: map[string]string{"team": "a"}, Annotations: map[string]string{"note": "n"}},
				Type: corev1.SecretTypeDockerConfigJson,
				Data: map[string][]byte{".dockerconfigjson": []byte("{}"), "other": []byte("other")},
			}
			if c.live != nil {
				live = c.live(live)
			}
			path := "secrets/creds"
			if c.path != "" {
				path = c.path
			}
			request := func() *http.Request {
				r, err := http.NewRequest(c.method, "https://server/", strings.NewReader(c.body))
				if err != nil {
					t.Fatal(err)
				}
				if c.method == "" {
					r.Method = "PATCH"
				}
				r.URL = r.URL.JoinPath("api/v1/namespaces/"+namespace, path)
				r.URL.RawQuery = c.query
				r.Header.Set("User-Agent", "conformance/1")
				if c.media == "" {
					r.Header.Set("Content-Type", mergePatch)
				} else if c.media != "-" {
					r.Header.Set("Content-Type", c.media)
				}
				if c.accept != "" {
					r.Header.Set("Accept", c.accept)
				}
				if c.token != "" {
					r.Header.Set("Authorization", "Bearer "+c.token)
				}
				return r
			}
			want, got := real.ask(t, live, request()), fake.ask(t, live, request())
			codes[want.Code] = true
			if !reflect.DeepEqual(got, want) {
				t.Errorf("stand-in\n%s\nreal server\n%s", got, want)
			}
		})
	}
	// Two servers that refuse everything would agree, too.
	want := []int{200, 201, 400, 401, 403, 404, 406, 409, 413, 415, 422, 500}
	if got := slices.Sorted(maps.Keys(codes)); !slices.Equal(got, want) && !t.Failed() {
		t.Errorf("codes %v, want %v", got, want)
	}
}

func immutable(s *corev1.Secret) *corev1.Secret {
	s.Immutable = new(true)
	return s
}

// server is one of the two API servers of the test above.
type server struct {
	name   string
	url    string
	token  string
	client *http.Client
	put    func(*testing.T, *corev1.Secret) // replaces the Secret creds; nil deletes it
	get    func(*testing.T) *corev1.Secret  // nil when it does not exist
}

// ask sends the request on the Secret live and returns the answer, without
// what is never the same twice.
func (s *server) ask(t *testing.T, live *corev1.Secret, r *http.Request) answer {
	t.Helper()
	s.put(t, live)
	before := s.get(t)
	r.URL.Host = strings.TrimPrefix(s.url, "https://")
	switch r.Header.Get("Authorization") {
	case "":
		r.Header.Set("Authorization", "Bearer "+s.token)
	case "Bearer -":
		r.Header.Del("Authorization")
	}
	response, err := s.client.Do(r)
	if err != nil {
		t.Fatalf("%s: %v", s.name, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := answer{Code: response.StatusCode, Media: response.Header.Get("Content-Type"), Warnings: response.Header.Values("Warning")}
	if err := json.Unmarshal(body, &a.Body); err != nil && strings.HasPrefix(a.Media, "application/json") {
		t.Fatalf("%v in %q", err, body)
	}
	a.Body.Message = normal(a.Body.Message)
	if d := a.Body.Details; d != nil {
		for i := range d.Causes {
			d.Causes[i].Message = normal(d.Causes[i].Message)
		}
		// The real server checks some fields more than once, and says so.
		d.Causes = slices.Compact(d.Causes)
	}
	after := s.get(t)
	if before != nil && after != nil {
		a.Written = after.ResourceVersion != before.ResourceVersion
		if after.UID != before.UID {
			t.Error("the Secret was replaced")
		}
	}
	if after != nil {
		after.ObjectMeta = metav1.ObjectMeta{Labels: after.Labels, Annotations: after.Annotations}
		after.TypeMeta = metav1.TypeMeta{}
	}
	a.Secret = after
	return a
}

var (
	wholeObject = regexp.MustCompile(`(?s)"\{\\"(kind|apiVersion)\\":.*\}": `)
	moment      = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)
)

// normal replaces times, and quoted objects, which hold UIDs and managed
// fields, by a word; another one for those that hold data which the request did
// not.
func normal(message string) string {
	message = wholeObject.ReplaceAllStringFunc(message, func(object string) string {
		if strings.Contains(object, "b3RoZXI=") {
			return "OBJECT WITH ITS DATA: "
		}
		return "OBJECT: "
	})
	return moment.ReplaceAllString(message, "TIME")
}

// newRealServer makes the namespace, and the account with its rights.
func newRealServer(t *testing.T, namespace, account string) *server {
	t.Helper()
	ctx := t.Context()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := cluster.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	check(err)
	_, err = cluster.client.CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: account}}, metav1.CreateOptions{})
	check(err)
	meta := metav1.ObjectMeta{Name: account}
	subjects := []rbacv1.Subject{{Kind: "ServiceAccount", Name: account, Namespace: namespace}}
	rule := func(name string, verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{name}, Verbs: verbs}
	}
	_, err = cluster.client.RbacV1().Roles(namespace).Create(ctx, &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		rule("creds", "patch", "create"), rule("patch-only", "patch")}}, metav1.CreateOptions{})
	check(err)
	_, err = cluster.client.RbacV1().RoleBindings(namespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{Kind: "Role", Name: account}, Subjects: subjects}, metav1.CreateOptions{})
	check(err)
	_, err = cluster.client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{
		ObjectMeta: meta, Rules: []rbacv1.PolicyRule{rule("nowhere", "patch", "create")}}, metav1.CreateOptions{})
	check(err)
	_, err = cluster.client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: meta, RoleRef: rbacv1.RoleRef{Kind: "ClusterRole", Name: account}, Subjects: subjects}, metav1.CreateOptions{})
	check(err)
	e := &environment{T: t}
	secrets := cluster.client.CoreV1().Secrets(namespace)
	return &server{
		name:   "real server",
		url:    cluster.admin.Host,
		token:  e.token(namespace, account),
		client: cluster.httpClient(),
		put: func(t *testing.T, s *corev1.Secret) {
			if err := secrets.Delete(t.Context(), "creds", metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
				t.Fatal(err)
			}
			if s != nil {
				if _, err := secrets.Create(t.Context(), s, metav1.CreateOptions{FieldManager: "kubectl-create"}); err != nil {
					t.Fatal(err)
				}
			}
		},
		get: func(t *testing.T) *corev1.Secret {
			s, err := secrets.Get(t.Context(), "creds", metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return nil
			}
			if err != nil {
				t.Fatal(err)
			}
			return s
		},
	}
}

// newStandIn gives the stand-in what newRealServer gives the real server.
func newStandIn(t *testing.T, namespace string) *server {
	t.Helper()
	k := standin.NewKubernetes(namespace, "default")
	k.Tokens = []string{"token"}
	k.Rules = []standin.Rule{
		{Namespace: namespace, Verbs: []string{"patch", "create"}, ResourceNames: []string{"creds"}},
		{Namespace: namespace, Verbs: []string{"patch"}, ResourceNames: []string{"patch-only"}},
		{Namespace: "missing", Verbs: []string{"patch", "create"}, ResourceNames: []string{"nowhere"}},
	}
	ca, err := standin.NewCA()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Certificate(standin.CertOptions{Hosts: []string{"127.0.0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	s := standin.Start(k, cert)
	t.Cleanup(s.Close)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca.PEM())
	return &server{
		name:   "stand-in",
		url:    s.URL,
		token:  "token",
		client: &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}},
		put: func(t *testing.T, s *corev1.Secret) {
			k.Delete(namespace, "creds")
			if s != nil {
				var object map[string]any
				data, err := json.Marshal(s)
				if err != nil {
					t.Fatal(err)
				}
				if err := json.Unmarshal(data, &object); err != nil {
					t.Fatal(err)
				}
				k.Put(namespace, "creds", object)
			}
		},
		get: func(t *testing.T) *corev1.Secret {
			object := k.Secret(namespace, "creds")
			if object == nil {
				return nil
			}
			data, err := json.Marshal(object)
			if err != nil {
				t.Fatal(err)
			}
			s := new(corev1.Secret)
			if err := json.Unmarshal(data, s); err != nil {
				t.Fatal(err)
			}
			return s
		},
	}
}
