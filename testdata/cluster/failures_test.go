package cluster

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Each case breaks one thing of an installed release. In the lines NS is the
// namespace, SECRET the Secret and SERVER the API server's address.
func TestFailuresSayTheirCauseAndChangeNothing(t *testing.T) {
	t.Parallel()
	const (
		user  = `User 'system:serviceaccount:NS:` + fullname + `-serviceaccount'`
		grant = `grant a Role in namespace NS with the rule {apiGroups: [''], resources: [secrets], resourceNames: [SECRET], ` +
			`verbs: [patch, create]}, bound to this pod's ServiceAccount; or is --namespace or --secret wrong?`
	)
	for _, test := range []struct {
		name     string
		prepare  func(e *environment)
		exit     int
		lastLine string
	}{
		{
			name: "wrong type",
			prepare: func(e *environment) {
				e.deleteSecret()
				e.createSecret(func(s *corev1.Secret) { s.Type = corev1.SecretTypeOpaque })
			},
			exit: 1,
			lastLine: `level=ERROR msg="patching secret NS/SECRET: HTTP 422 Unprocessable Entity: Secret 'SECRET' is invalid: type: Invalid value: [withheld]" ` +
				`hint="the Secret's type is not kubernetes.io/dockerconfigjson and cannot be changed: choose another --secret, or delete it ` +
				`(kubectl delete secret SECRET -n NS) and run again"`,
		},
		{
			name: "immutable",
			prepare: func(e *environment) {
				e.kubectl("patch", "secret", pullSecret, `--patch={"immutable":true}`)
			},
			exit: 1,
			lastLine: `level=ERROR msg="patching secret NS/SECRET: HTTP 422 Unprocessable Entity: Secret 'SECRET' is invalid: ` +
				"data: Forbidden: field is immutable when `immutable` is set\" " +
				`hint="the Secret is marked immutable, which cannot be undone: delete it (kubectl delete secret SECRET -n NS) and run again"`,
		},
		{
			name: "Role missing",
			prepare: func(e *environment) {
				e.kubectl("delete", "role", fullname+"-update-role")
			},
			exit: 1,
			lastLine: `level=ERROR msg="patching secret NS/SECRET: HTTP 403 Forbidden: secrets 'SECRET' is forbidden: ` + user +
				` cannot patch resource 'secrets' in API group '' in the namespace 'NS': ` +
				`RBAC: role.rbac.authorization.k8s.io '` + fullname + `-update-role' not found" hint="` + grant + `"`,
		},
		{
			name: "expired token",
			prepare: func(e *environment) {
				e.useExpiredToken()
			},
			exit: 1,
			lastLine: `level=ERROR msg="patching secret NS/SECRET: HTTP 401 Unauthorized: Unauthorized" ` +
				`hint="the API server does not accept the token in DIR: does the ServiceAccount still exist, and is the token this cluster's?"`,
		},
		{
			name: "missing namespace",
			prepare: func(e *environment) {
				// A Role cannot be in a namespace that does not exist; rights in
				// all namespaces are what makes the server look for it.
				_, err := cluster.client.RbacV1().ClusterRoleBindings().Create(e.Context(), &rbacv1.ClusterRoleBinding{
					ObjectMeta: metav1.ObjectMeta{Name: e.namespace},
					RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
					Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Name: fullname + "-serviceaccount", Namespace: e.namespace}},
				}, metav1.CreateOptions{})
				e.check(err)
				e.upgrade("--set", "extraArgs[0]=--namespace=missing", "--set", "refreshOnInstall=false")
			},
			exit: 1,
			lastLine: `level=ERROR msg="creating secret missing/SECRET: HTTP 404 Not Found: namespaces 'missing' not found" ` +
				`hint="the namespace missing does not exist: correct --namespace, or create it"`,
		},
	} {
		t.Run(strings.ReplaceAll(test.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			// What fails is the program: the Helm that installed it is all one.
			e := newEnvironment(t, "helm4")
			e.install()
			test.prepare(e)
			before := e.secret()
			e.setPassword("second-password")
			r := e.runNow()
			want := strings.NewReplacer("NS", e.namespace, "SECRET", pullSecret, "DIR", r.container.mount).Replace(test.lastLine)
			e.wantFailure(r, test.exit, want)
			e.wantSame(before)
			for _, secret := range []string{"first-password", "second-password", accessKey.Secret} {
				if strings.Contains(r.stderr, secret) {
					e.Errorf("stderr holds %q", secret)
				}
			}
		})
	}
}

// useExpiredToken gives the namespace's pods a token of their service account
// that ended an hour ago.
func (e *environment) useExpiredToken() {
	e.Helper()
	account, err := cluster.client.CoreV1().ServiceAccounts(e.namespace).Get(e.Context(), fullname+"-serviceaccount", metav1.GetOptions{})
	e.check(err)
	claims := func(from, to time.Time) map[string]any {
		return map[string]any{
			"iss": issuer, "aud": []string{issuer},
			"sub": fmt.Sprintf("system:serviceaccount:%s:%s", e.namespace, account.Name),
			"iat": from.Unix(), "nbf": from.Unix(), "exp": to.Unix(),
			"kubernetes.io": map[string]any{
				"namespace":      e.namespace,
				"serviceaccount": map[string]any{"name": account.Name, "uid": account.UID},
			},
		}
	}
	// Only its end is wrong with it: the same token with a later one is good.
	good, err := cluster.signToken(claims(time.Now().Add(-2*time.Hour), time.Now().Add(time.Hour)))
	e.check(err)
	worker.useToken(e.namespace, good)
	e.mustRun()
	expired, err := cluster.signToken(claims(time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)))
	e.check(err)
	worker.useToken(e.namespace, expired)
}
