package cluster

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"ecr-refresher/testdata/standin"
)

const (
	chart    = "../../chart"
	region   = "eu-west-1"
	registry = "123456789012.dkr.ecr." + region + ".amazonaws.com"

	// What the chart names its resources for the release "pull".
	release    = "pull"
	fullname   = "pull-ecr-refresher"
	pullSecret = fullname + "-credentials"
)

var accessKey = standin.Key{ID: "AKIAIOSFODNN7EXAMPLE", Secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"}

// environment is a namespace that enforces the Pod Security Standard
// "restricted", an ECR that its pods reach, and the Helm that installs there.
type environment struct {
	*testing.T
	helmName  string // helm3 or helm4
	namespace string
	values    string // file with the values that lead pods to the stand-in
	home      string // Helm's and kubectl's
	awsCA     []byte // PEM
	ecr       atomic.Pointer[standin.ECR]
	sts       http.HandlerFunc // nil: nobody may call it
}

// withHelms runs test with Helm 3 and with Helm 4, at once, in environments of their own.
func withHelms(t *testing.T, test func(e *environment)) {
	t.Parallel()
	for _, name := range []string{"helm3", "helm4"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(newEnvironment(t, name))
		})
	}
}

var namespaces atomic.Int32

func newEnvironment(t *testing.T, helmName string) *environment {
	t.Helper()
	e := &environment{T: t, helmName: helmName, home: t.TempDir()}
	ca, err := standin.NewCA()
	e.check(err)
	e.awsCA = ca.PEM()
	cert, err := ca.Certificate(standin.CertOptions{Hosts: []string{"127.0.0.1"}})
	e.check(err)
	e.setPassword("first-password")
	server := standin.Start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if e.sts != nil && r.Header.Get("X-Amz-Target") == "" { // STS has another protocol than ECR
			e.sts(w, r)
			return
		}
		e.ecr.Load().ServeHTTP(w, r)
	}), cert)
	t.Cleanup(server.Close)
	e.namespace = e.newNamespace()

	values, err := yaml.Marshal(map[string]any{
		"region": region,
		"aws":    map[string]any{"accessKeyID": accessKey.ID, "secretAccessKey": accessKey.Secret},
		"extraEnv": []any{
			map[string]any{"name": "AWS_ENDPOINT_URL", "value": server.URL},
			map[string]any{"name": "AWS_CA_BUNDLE", "value": "/etc/aws/ca.crt"},
		},
		"extraVolumes":      []any{map[string]any{"name": "aws-ca", "configMap": map[string]any{"name": "aws-ca"}}},
		"extraVolumeMounts": []any{map[string]any{"name": "aws-ca", "mountPath": "/etc/aws", "readOnly": true}},
	})
	e.check(err)
	e.values = filepath.Join(e.home, "values.yaml")
	e.check(os.WriteFile(e.values, values, 0o600))
	return e
}

// newNamespace makes a namespace with what a cluster's controllers put into
// each, and the stand-ins' CA.
func (e *environment) newNamespace() string {
	e.Helper()
	name := fmt.Sprintf("%s-%d", e.helmName, namespaces.Add(1))
	ctx := e.Context()
	_, err := cluster.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name:   name,
		Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}, metav1.CreateOptions{})
	e.check(err)
	for configMap, ca := range map[string][]byte{"kube-root-ca.crt": cluster.ca, "aws-ca": e.awsCA} {
		_, err = cluster.client.CoreV1().ConfigMaps(name).Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: configMap},
			Data:       map[string]string{"ca.crt": string(ca)},
		}, metav1.CreateOptions{})
		e.check(err)
	}
	_, err = cluster.client.CoreV1().ServiceAccounts(name).Create(ctx, &corev1.ServiceAccount{
		ObjectMeta: metav1.ObjectMeta{Name: "default"},
	}, metav1.CreateOptions{})
	e.check(err)
	return name
}

func (e *environment) check(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

// setPassword makes ECR hand out another token from now on.
func (e *environment) setPassword(password string) {
	ecr := &standin.ECR{Region: region, Account: registry[:12], Password: password}
	ecr.Allow(accessKey)
	e.ecr.Store(ecr)
}

// command runs a tool against the cluster; output is stdout and stderr.
func (e *environment) command(stdin, tool string, args ...string) (stdout, output string, err error) {
	cmd := exec.CommandContext(e.Context(), cluster.paths[tool], args...)
	cmd.Env = []string{
		"HOME=" + e.home, "PATH=" + os.Getenv("PATH"), "KUBECONFIG=" + cluster.kubeconfig,
		"HELM_CACHE_HOME=" + e.home, "HELM_CONFIG_HOME=" + e.home, "HELM_DATA_HOME=" + e.home,
	}
	cmd.Stdin = strings.NewReader(stdin)
	var out, both bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &both
	err = cmd.Run()
	return out.String(), out.String() + both.String(), err
}

// helm runs Helm in the environment's namespace and returns its standard output.
func (e *environment) helm(args ...string) string {
	e.Helper()
	return e.helmIn(e.namespace, args...)
}

func (e *environment) helmIn(namespace string, args ...string) string {
	e.Helper()
	stdout, output, err := e.command("", e.helmName, append(args, "--namespace", namespace)...)
	if err != nil {
		e.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, tail(output, 20))
	}
	return stdout
}

// helmFails runs Helm, which has to fail, and returns all that it printed.
func (e *environment) helmFails(args ...string) string {
	e.Helper()
	_, output, err := e.command("", e.helmName, append(args, "--namespace", e.namespace)...)
	if err == nil {
		e.Fatalf("helm %s succeeded", strings.Join(args, " "))
	}
	return output
}

// install installs the chart as the release "pull".
func (e *environment) install(args ...string) {
	e.Helper()
	e.helm(append([]string{"install", release, chart, "--values", e.values, "--timeout=60s"}, args...)...)
}

// upgrade upgrades the release; values that args do not set are the environment's.
func (e *environment) upgrade(args ...string) {
	e.Helper()
	e.helm(append([]string{"upgrade", release, chart, "--values", e.values, "--timeout=60s"}, args...)...)
}

func (e *environment) kubectl(args ...string) string {
	e.Helper()
	return e.kubectlWith("", args...)
}

func (e *environment) kubectlWith(stdin string, args ...string) string {
	e.Helper()
	stdout, output, err := e.command(stdin, "kubectl", append(args, "--namespace", e.namespace)...)
	if err != nil {
		e.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, tail(output, 10))
	}
	return stdout
}

var jobs atomic.Int32

// runNow starts the CronJob's pod as the chart's notes say, and returns how it ended.
func (e *environment) runNow() result {
	e.Helper()
	return e.runCronJob(e.namespace, fullname)
}

func (e *environment) runCronJob(namespace, cronJob string) result {
	e.Helper()
	name := fmt.Sprintf("%s-now-%d", cronJob, jobs.Add(1))
	_, output, err := e.command("", "kubectl", "create", "job", name, "-n", namespace, "--from=cronjob/"+cronJob)
	if err != nil {
		e.Fatalf("kubectl create job: %v\n%s", err, output)
	}
	return e.wait(namespace, name)
}

// mustRun is runNow for a run that has to succeed.
func (e *environment) mustRun() {
	e.Helper()
	if r := e.runNow(); r.exit != 0 || r.stdout != "" {
		e.Fatalf("exit code %d, stdout %q, stderr:\n%s", r.exit, r.stdout, r.stderr)
	}
}

// wait waits for the end of a Job or of a pod without a Job.
func (e *environment) wait(namespace, name string) result {
	e.Helper()
	ctx, cancel := context.WithTimeout(e.Context(), 90*time.Second)
	defer cancel()
	r, err := worker.wait(ctx, namespace, name)
	e.check(err)
	return r
}

// secret returns the image-pull Secret of the release "pull".
func (e *environment) secret() *corev1.Secret {
	e.Helper()
	return e.secretIn(e.namespace, pullSecret)
}

func (e *environment) secretIn(namespace, name string) *corev1.Secret {
	e.Helper()
	s, err := cluster.client.CoreV1().Secrets(namespace).Get(e.Context(), name, metav1.GetOptions{})
	e.check(err)
	return s
}

func (e *environment) wantNoSecret() {
	e.Helper()
	_, err := cluster.client.CoreV1().Secrets(e.namespace).Get(e.Context(), pullSecret, metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		e.Fatalf("getting the Secret: %v, want NotFound", err)
	}
}

func (e *environment) deleteSecret() {
	e.Helper()
	e.check(cluster.client.CoreV1().Secrets(e.namespace).Delete(e.Context(), pullSecret, metav1.DeleteOptions{}))
}

// createSecret creates an image-pull Secret as somebody else would have.
func (e *environment) createSecret(change func(*corev1.Secret)) *corev1.Secret {
	e.Helper()
	s := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: pullSecret},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: []byte(`{}`)},
	}
	if change != nil {
		change(s)
	}
	s, err := cluster.client.CoreV1().Secrets(e.namespace).Create(e.Context(), s, metav1.CreateOptions{})
	e.check(err)
	return s
}

// wantSame fails the test when the Secret was written to since before.
func (e *environment) wantSame(before *corev1.Secret) {
	e.Helper()
	after := e.secretIn(before.Namespace, before.Name)
	if after.UID != before.UID || after.ResourceVersion != before.ResourceVersion {
		e.Fatalf("the Secret was written to: UID %s to %s, resourceVersion %s to %s",
			before.UID, after.UID, before.ResourceVersion, after.ResourceVersion)
	}
}

// dockerConfig is the .dockerconfigjson that a run writes for password.
func dockerConfig(password string) string {
	return fmt.Sprintf(`{"auths":{"%s":{"username":"AWS","password":"%s","auth":"%s"}}}`,
		registry, password, base64.StdEncoding.EncodeToString([]byte("AWS:"+password)))
}

// wantContent fails the test unless the Secret is what a run with password makes of it.
func (e *environment) wantContent(s *corev1.Secret, password string) {
	e.Helper()
	if s.Type != corev1.SecretTypeDockerConfigJson {
		e.Errorf("type %q", s.Type)
	}
	if got, want := string(s.Data[corev1.DockerConfigJsonKey]), dockerConfig(password); got != want {
		e.Errorf(".dockerconfigjson %s, want %s", got, want)
	}
	for annotation, ahead := range map[string]time.Duration{"ecr-refresher/expires-at": 12 * time.Hour, "ecr-refresher/refreshed-at": 0} {
		at, err := time.Parse("2006-01-02T15:04:05Z", s.Annotations[annotation])
		if off := time.Until(at) - ahead; err != nil || off.Abs() > time.Minute {
			e.Errorf("annotation %s: %q", annotation, s.Annotations[annotation])
		}
	}
}
