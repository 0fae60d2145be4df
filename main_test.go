package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"ecr-refresher/testdata/standin"
)

// program is the compiled program, built as the image builds it.
var program string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "ecr-refresher-test-")
	if err != nil {
		panic(err)
	}
	program = filepath.Join(dir, "ecr-refresher")
	build := exec.Command("go", "build", "-trimpath", "-tags", "nethttpomithttp2", "-ldflags", "-s -w -X main.version=1.2.3-test", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	code := 1
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// The secrets of a world: none of them may ever be printed.
const (
	saToken      = "service-account-token-eyJhbGciOiJSUzI1NiJ9"
	awsSecret    = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
	awsSession   = "FwoGZXIvYXdzEXAMPLESESSIONTOKEN//////////wEaDPhQ=="
	issuedSecret = "issued+secret/AccessKeyOfAnAssumedRole000"
	issuedToken  = "IssuedSessionToken//0123456789+abcdefghijklmn=="
	ecrPassword  = "eyJwYXlsb2FkIjoiZWNyIn0=.password/of+the/registry"
	jwt          = "eyJhbGciOiJSUzI1NiIsImtpZCI6IngifQ.eyJzdWIiOiJ4In0.c2ln"
)

// world is one cluster and one AWS account, as stand-ins on loopback, and the environment of a pod in it.
type world struct {
	t      *testing.T
	ca     *standin.CA
	ecr    *standin.ECR
	k8s    *standin.Kubernetes
	mount  string
	dir    string
	env    map[string]string
	api    *httptest.Server
	ecrURL string
}

const (
	ns      = "shop"
	name    = "ecr-credentials"
	region  = "eu-central-1"
	account = "123456789012"
	ecrName = account + ".dkr.ecr." + region + ".amazonaws.com"
)

// newWorld returns a world in which a run with --secret ecr-credentials succeeds, with access keys, and creates the
// Secret.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), env: map[string]string{}}
	var err error
	if w.ca, err = standin.NewCA(); err != nil {
		t.Fatal(err)
	}
	w.mount = filepath.Join(w.dir, "serviceaccount")
	w.writeMount(saToken)

	w.k8s = standin.NewKubernetes(ns)
	w.k8s.SetTokens(saToken)
	w.k8s.SetRules(standin.Rule{Namespace: ns, Verbs: []string{"patch", "create"}, ResourceNames: []string{name}})
	w.api = w.startTLS(w.k8s)
	w.setAPI(w.api.URL)

	w.ecr = &standin.ECR{Region: region, Account: account, Password: ecrPassword}
	w.ecr.Allow(standin.Key{ID: "AKIAIOSFODNN7EXAMPLE", Secret: awsSecret, SessionToken: awsSession})
	w.ecr.Allow(standin.Key{ID: "ASIAISSUED", Secret: issuedSecret, SessionToken: issuedToken})
	w.ecrURL = w.startTLS(w.ecr).URL
	w.env["AWS_REGION"] = region
	w.env["AWS_ENDPOINT_URL_ECR"] = w.ecrURL
	w.env["AWS_CA_BUNDLE"] = w.file("aws-ca.pem", string(w.ca.PEM()))
	w.env["AWS_ACCESS_KEY_ID"] = "AKIAIOSFODNN7EXAMPLE"
	w.env["AWS_SECRET_ACCESS_KEY"] = awsSecret
	w.env["AWS_SESSION_TOKEN"] = awsSession
	return w
}

// startTLS serves h with a certificate of the world's CA.
func (w *world) startTLS(h http.Handler) *httptest.Server {
	w.t.Helper()
	return w.startTLSAs(h, standin.CertOptions{Hosts: []string{"127.0.0.1", "::1", "localhost"}})
}

func (w *world) startTLSAs(h http.Handler, o standin.CertOptions) *httptest.Server {
	w.t.Helper()
	cert, err := w.ca.Certificate(o)
	if err != nil {
		w.t.Fatal(err)
	}
	server := standin.Start(h, cert)
	w.t.Cleanup(server.Close)
	return server
}

func (w *world) setAPI(address string) {
	u, err := url.Parse(address)
	if err != nil {
		w.t.Fatal(err)
	}
	w.env["KUBERNETES_SERVICE_HOST"], w.env["KUBERNETES_SERVICE_PORT"] = u.Hostname(), u.Port()
}

func (w *world) writeMount(token string) {
	w.t.Helper()
	if err := standin.WriteServiceAccount(w.mount, token, ns, w.ca.PEM()); err != nil {
		w.t.Fatal(err)
	}
}

// file writes a file into the world's folder and returns its path.
func (w *world) file(name, content string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// clearSource removes the access keys, so that a test can configure another source.
func (w *world) clearSource() {
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"} {
		delete(w.env, name)
	}
}

// outcome is what a run of the program showed.
type outcome struct {
	code           int
	stdout, stderr string
	took           time.Duration
}

// last is the last line on stderr without its time stamp.
func (o outcome) last() string {
	lines := strings.Split(strings.TrimRight(o.stderr, "\n"), "\n")
	return regexp.MustCompile(`^time=\S+ `).ReplaceAllString(lines[len(lines)-1], "")
}

// command is the program, ready to start, with the world's environment and nothing else.
func (w *world) command(args ...string) *exec.Cmd {
	cmd := exec.Command(program, append([]string{"--service-account-dir", w.mount}, args...)...)
	for k, v := range w.env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return cmd
}

// run runs the program with --secret ecr-credentials and args, and checks that it printed no secret.
func (w *world) run(args ...string) outcome {
	w.t.Helper()
	cmd := w.command(append([]string{"--secret", name}, args...)...)
	return w.wait(cmd)
}

func (w *world) wait(cmd *exec.Cmd) outcome {
	w.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatal(err)
	}
	o := outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String(), time.Since(start)}
	checkNoSecrets(w.t, o.stdout+o.stderr)
	return o
}

// checkNoSecrets fails the test when text holds a secret, or half of one, in any of the forms that servers echo.
func checkNoSecrets(t *testing.T, text string) {
	t.Helper()
	for what, secret := range map[string]string{
		"service-account token": saToken, "AWS secret key": awsSecret, "AWS session token": awsSession,
		"issued secret key": issuedSecret, "issued session token": issuedToken, "registry password": ecrPassword, "projected token": jwt,
		"authorization token": base64.StdEncoding.EncodeToString([]byte("AWS:" + ecrPassword)),
	} {
		b := []byte(secret)
		for form, s := range map[string]string{
			"as it is": secret, "its first half": secret[:len(secret)/2], "its second half": secret[len(secret)/2:],
			"in base64": base64.RawStdEncoding.EncodeToString(b), "URL-encoded": url.QueryEscape(secret),
			"in base64 after a byte":    base64.RawStdEncoding.EncodeToString(append([]byte("x"), b...))[4:20],
			"in base64 after two bytes": base64.RawStdEncoding.EncodeToString(append([]byte("xx"), b...))[4:20],
		} {
			if strings.Contains(text, s) {
				t.Errorf("the output holds the %s, %s:\n%s", what, form, text)
			}
		}
	}
}

// secret is the world's Secret, decoded.
type secret struct {
	Type     string
	Metadata struct {
		UID, ResourceVersion string
		Labels, Annotations  map[string]string
	}
	Data map[string][]byte
}

func (w *world) secret() *secret {
	w.t.Helper()
	object := w.k8s.Secret(ns, name)
	if object == nil {
		return nil
	}
	b, err := json.Marshal(object)
	if err != nil {
		w.t.Fatal(err)
	}
	var s secret
	if err := json.Unmarshal(b, &s); err != nil {
		w.t.Fatal(err)
	}
	return &s
}

// put stores a Secret as a user would have made it.
func (w *world) put(typ string, data map[string]any) {
	w.k8s.Put(ns, name, map[string]any{
		"metadata": map[string]any{"labels": map[string]any{"team": "web"}, "annotations": map[string]any{"note": "keep me"}},
		"type":     typ,
		"data":     data,
	})
}

const (
	dockerConfigType = "kubernetes.io/dockerconfigjson"
	oldConfig        = "eyJhdXRocyI6e319" // {"auths":{}}
)

// putOld stores an image-pull Secret of an earlier run.
func (w *world) putOld() {
	w.put(dockerConfigType, map[string]any{".dockerconfigjson": oldConfig, "other": "a2VlcA=="})
}
