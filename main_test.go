package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"debug/elf"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"ecr-refresher/testdata/standin"
)

// program is the compiled program, built as the image builds it.
var program string

func TestMain(m *testing.M) {
	if os.Getenv("TEST_WANT_ROOTS") != "" { // a process of TestPublicRootsAreInTheBinary
		os.Exit(m.Run())
	}
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

// The secrets of a world: none of them may ever be printed. Tokens are as long as the real ones, longer than what is kept
// of a message.
var (
	saToken    = "service-account-token-eyJhbGciOiJSUzI1NiJ9." + strings.Repeat("eyJhdWQiOlsiaHR0cHM6Ly9r", 30) + ".c2ln"
	awsSession = "FwoGZXIvYXdzEXAMPLESESSIONTOKEN//////////wEaDPhQ" + strings.Repeat("k7MDENG/bPxRfiCY", 40) + "=="
)

const (
	awsSecret    = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
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
	// The race detector cannot see that a program outside of this process comes between what a test sets up and what its
	// servers read, but it takes a write to a file for earlier than every later read.
	w.file("started", "now")
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

func TestRunCreatesThenPatchesInPlace(t *testing.T) {
	w := newWorld(t)
	w.ecr.ExpiresAt = time.Date(2099, 1, 2, 3, 4, 5, 600e6, time.UTC)
	o := w.run()
	if o.code != exitOK || o.stdout != "" || !strings.Contains(o.last(), `level=INFO msg="secret created"`) {
		t.Fatalf("exit %d, stdout %q, stderr %q", o.code, o.stdout, o.stderr)
	}
	created := w.secret()
	want := fmt.Sprintf(`{"auths":{%q:{"username":"AWS","password":%q,"auth":%q}}}`, ecrName, ecrPassword, w.ecr.Token())
	if got := string(created.Data[".dockerconfigjson"]); got != want {
		t.Errorf("docker config\n got %s\nwant %s", got, want)
	}
	if got := created.Metadata.Annotations["ecr-refresher/expires-at"]; got != "2099-01-02T03:04:05Z" {
		t.Errorf("expires-at %q", got)
	}
	if at, err := time.Parse(time.RFC3339, created.Metadata.Annotations["ecr-refresher/refreshed-at"]); err != nil || time.Since(at) > time.Minute {
		t.Errorf("refreshed-at %q", created.Metadata.Annotations["ecr-refresher/refreshed-at"])
	}

	w.ecr.Password = "another-password"
	o = w.run()
	if o.code != exitOK || !regexp.MustCompile(`^level=INFO msg="secret patched" secret=shop/ecr-credentials registries=`+ecrName+
		` regions=eu-central-1 credentials="access keys" expires=2099-01-02T03:04:05Z took=\d+m?s$`).MatchString(o.last()) {
		t.Fatalf("exit %d, stderr %q", o.code, o.stderr)
	}
	patched := w.secret()
	if patched.Metadata.UID != created.Metadata.UID || !strings.Contains(string(patched.Data[".dockerconfigjson"]), "another-password") {
		t.Errorf("not patched in place: %+v", patched)
	}
	if n := strings.Count(o.stderr, "\n"); n != 1 {
		t.Errorf("%d lines on stderr, want 1:\n%s", n, o.stderr)
	}
}

func TestRegistriesAreWrittenAsBareSortedHosts(t *testing.T) {
	w := newWorld(t)
	other := "210987654321.dkr.ecr." + region + ".amazonaws.com"
	if o := w.run("--registry", "https://"+other+"/", "--registry", ecrName, "--registry", ecrName); o.code != exitOK {
		t.Fatalf("exit %d: %s", o.code, o.stderr)
	}
	if calls := len(w.ecr.Requests()); calls != 1 {
		t.Errorf("%d ECR calls for one region", calls)
	}
	entry := fmt.Sprintf(`{"username":"AWS","password":%q,"auth":%q}`, ecrPassword, w.ecr.Token())
	want := fmt.Sprintf(`{"auths":{%q:%s,%q:%s}}`, ecrName, entry, other, entry)
	if got := string(w.secret().Data[".dockerconfigjson"]); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestDryRunStoresNothing(t *testing.T) {
	w := newWorld(t)
	o := w.run("--dry-run")
	if o.code != exitOK || !strings.Contains(o.last(), "secret would be created (dry run)") || w.secret() != nil {
		t.Errorf("exit %d, Secret %+v: %s", o.code, w.secret(), o.stderr)
	}
	w.putOld()
	before := w.secret()
	o = w.run("--dry-run")
	if o.code != exitOK || !strings.Contains(o.last(), "secret would be patched (dry run)") || w.secret().Metadata.ResourceVersion != before.Metadata.ResourceVersion {
		t.Errorf("exit %d: %s", o.code, o.stderr)
	}
	w.k8s.SetRules()
	if o = w.run("--dry-run"); o.code != exitFailure {
		t.Errorf("a dry run without rights ended with %d", o.code)
	}
}

func TestLogFormatJSONIsOneObjectPerLine(t *testing.T) {
	w := newWorld(t)
	for _, want := range []struct {
		args []string
		code int
		msg  string
	}{
		{[]string{"--log-format", "json"}, exitOK, "secret created"},
		{[]string{"--log-format", "json", "--timeout", "x"}, exitUsage, "invalid flag --timeout: 'x' is not a duration above zero, such as 30s or 1m"},
	} {
		o := w.run(want.args...)
		var line struct{ Level, Msg, Hint string }
		if err := json.Unmarshal([]byte(o.stderr), &line); err != nil || o.code != want.code || line.Msg != want.msg {
			t.Errorf("%q: exit %d, %v: %s", want.args, o.code, err, o.stderr)
		}
	}
}

func TestExpiryInThePastIsAWarning(t *testing.T) {
	w := newWorld(t)
	w.ecr.ExpiresAt = time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	o := w.run()
	if o.code != exitOK || !strings.Contains(o.stderr, `level=WARN msg="the token's expiry lies in the past: is this node's clock right?" expires=2020-01-02T03:04:05Z`) {
		t.Errorf("exit %d: %s", o.code, o.stderr)
	}
}

func TestConfigurationErrorsNameTheirFlagOrVariable(t *testing.T) {
	unset := func(names ...string) func(*world) {
		return func(w *world) {
			for _, n := range names {
				delete(w.env, n)
			}
		}
	}
	for _, c := range []struct {
		args  []string
		setup func(*world)
		want  string // of the message, whole
	}{
		{args: []string{"--secret", ""}, want: "required flag: --secret"},
		{args: []string{"--secret", "ECR"}, want: "invalid flag --secret: 'ECR' is not a DNS-1123 name (lower-case letters, digits, '-' and '.')"},
		{args: []string{"--secret", "a/../b"}, want: "invalid flag --secret: 'a/../b' is not a DNS-1123 name (lower-case letters, digits, '-' and '.')"},
		{args: []string{"--namespace", "a.b"}, want: "invalid flag --namespace: 'a.b' is not a DNS-1123 label (lower-case letters, digits and '-', at most 63)"},
		{args: []string{"--namespace", strings.Repeat("a", 64)}, want: "invalid flag --namespace: '" + strings.Repeat("a", 64) + "' is not a DNS-1123 label (lower-case letters, digits and '-', at most 63)"},
		{args: []string{"--bogus=1"}, want: "unknown flag: --bogus"},
		{args: []string{"-n", "shop"}, want: "unknown flag: -n; unexpected argument: 'shop'"},
		{args: []string{"stray"}, want: "unexpected argument: 'stray'"},
		{args: []string{awsSecret}, want: "unexpected argument: '[redacted]'"},
		{args: []string{"--namespace"}, want: "flag needs an argument: --namespace"},
		{args: []string{"--dry-run=maybe"}, want: "invalid flag --dry-run: 'maybe' is not true or false"},
		{args: []string{"--timeout", "60"}, want: "invalid flag --timeout: '60' is not a duration above zero, such as 30s or 1m"},
		{args: []string{"--timeout", "-1s"}, want: "invalid flag --timeout: '-1s' is not a duration above zero, such as 30s or 1m"},
		{args: []string{"--log-format", "xml"}, want: "invalid flag --log-format: 'xml' is neither text nor json"},
		{args: []string{"--api-server", "http://10.0.0.1"}, want: "invalid flag --api-server: 'http://10.0.0.1' must start with https://, so that the service-account token never travels in clear"},
		{args: []string{"--registry", "123456789012.dkr.ecr.eu—central-1.amazonaws.com"}, want: "invalid flag --registry: '123456789012.dkr.ecr.eu—central-1.amazonaws.com' has the character '—' (U+2014), which no registry host has"},
		{args: []string{"--registry", "proxy.example"}, want: "invalid flag --registry: 'proxy.example' is no ECR host, so its region is not known: give --region"},
		{args: []string{"--region", "EU"}, want: "invalid flag --region: 'EU' is not an AWS region"},
		{args: []string{"--region", "us-east-1", "--registry", ecrName}, want: "invalid flag --region: us-east-1 contradicts --registry " + ecrName + ", which lies in eu-central-1"},
		{setup: unset("AWS_REGION"), want: "invalid region: none is given: set --region, --registry or AWS_REGION"},
		{setup: func(w *world) { w.env["AWS_REGION"] = "eu central" }, want: "invalid environment AWS_REGION: 'eu central' is not an AWS region"},
		{setup: unset("KUBERNETES_SERVICE_HOST"), want: "invalid environment: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not both set: outside a pod, give --api-server"},
		{setup: unset("AWS_SECRET_ACCESS_KEY"), want: "invalid environment: AWS_ACCESS_KEY_ID is set, but AWS_SECRET_ACCESS_KEY is not"},
		// All of a run's errors at once.
		{args: []string{"--secret", "", "--timeout", "x", "--bogus", "--region", "x y"}, setup: unset("KUBERNETES_SERVICE_PORT"),
			want: "unknown flag: --bogus; invalid flag --timeout: 'x' is not a duration above zero, such as 30s or 1m; required flag: --secret; " +
				"invalid environment: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not both set: outside a pod, give --api-server; invalid flag --region: 'x y' is not an AWS region"},
	} {
		w := newWorld(t)
		if c.setup != nil {
			c.setup(w)
		}
		o := w.run(c.args...)
		want := fmt.Sprintf("level=ERROR msg=%q hint=\"see ecr-refresher --help\"", c.want)
		if o.code != exitUsage || o.last() != want || o.stdout != "" || strings.Count(o.stderr, "\n") != 1 {
			t.Errorf("%q: exit %d\n got %s\nwant %s", c.args, o.code, o.last(), want)
		}
		if len(w.ecr.Requests())+len(w.k8s.Requests()) > 0 {
			t.Errorf("%q: a request was sent", c.args)
		}
	}
}

func TestServiceAccountMountIsChecked(t *testing.T) {
	for _, c := range []struct {
		name  string
		setup func(t *testing.T, mount string)
		want  string
	}{
		{"no mount", func(t *testing.T, mount string) { remove(t, mount) }, "stat MOUNT: no such file or directory: the pod needs automountServiceAccountToken: true"},
		{"no token", func(t *testing.T, mount string) { remove(t, mount+"/token") }, "open MOUNT/token: no such file or directory"},
		{"empty token", func(t *testing.T, mount string) { overwrite(t, mount+"/token", " \n") }, "MOUNT/token is empty"},
		{"no certificate", func(t *testing.T, mount string) { overwrite(t, mount+"/ca.crt", "garbage") }, "MOUNT/ca.crt holds no certificate"},
		{"empty ca.crt", func(t *testing.T, mount string) { overwrite(t, mount+"/ca.crt", "") }, "MOUNT/ca.crt is empty"},
		{"no namespace", func(t *testing.T, mount string) { remove(t, mount+"/namespace") }, "open MOUNT/namespace: no such file or directory; give --namespace"},
		{"garbage namespace", func(t *testing.T, mount string) { overwrite(t, mount+"/namespace", "../x") }, "MOUNT/namespace does not hold a namespace's name"},
	} {
		w := newWorld(t)
		c.setup(t, w.mount)
		o := w.run()
		want := fmt.Sprintf("level=ERROR msg=%q hint=\"see ecr-refresher --help\"",
			"invalid service-account mount (--service-account-dir): "+strings.ReplaceAll(c.want, "MOUNT", w.mount))
		if o.code != exitUsage || o.last() != want {
			t.Errorf("%s: exit %d\n got %s\nwant %s", c.name, o.code, o.last(), want)
		}
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

// overwrite replaces a file, or the link to one.
func overwrite(t *testing.T, path, content string) {
	t.Helper()
	remove(t, path)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestAPIServerIsReachedWithoutProxyAndByIPv6(t *testing.T) {
	proxy := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		t.Errorf("the proxy was asked for %s %s", r.Method, r.Host)
	}))
	defer proxy.Close()
	w := newWorld(t)
	// A name, since net/http never sends a loopback address through a proxy.
	w.env["HTTPS_PROXY"], w.env["HTTP_PROXY"] = proxy.URL, proxy.URL
	o := w.run("--api-server", "https://kubernetes.invalid:6443", "--timeout", "3s")
	if o.code != exitFailure || !strings.Contains(o.last(), "kubernetes.invalid") {
		t.Errorf("exit %d: %s", o.code, o.last())
	}

	listener, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 loopback:", err)
	}
	cert, err := w.ca.Certificate(standin.CertOptions{Hosts: []string{"::1"}})
	if err != nil {
		t.Fatal(err)
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: w.k8s}, TLS: &tls.Config{Certificates: []tls.Certificate{cert}}}
	server.StartTLS()
	defer server.Close()
	w.setAPI(server.URL)
	if w.env["KUBERNETES_SERVICE_HOST"] != "::1" {
		t.Fatal(server.URL)
	}
	if o := w.run(); o.code != exitOK {
		t.Errorf("exit %d: %s", o.code, o.last())
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	w := newWorld(t)
	w.putOld()
	other := w.startTLS(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		t.Errorf("the redirect was followed, with Authorization %q", r.Header.Get("Authorization"))
	}))
	for _, code := range []int{http.StatusMovedPermanently, http.StatusTemporaryRedirect} {
		w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
			http.Redirect(rw, r, other.URL, code)
			return true
		}
		if o := w.run(); o.code != exitFailure || !strings.Contains(o.last(), "redirects are not followed") {
			t.Errorf("exit %d: %s", o.code, o.last())
		}
	}
}

func TestSignalEndsTheRunAtOnce(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		w := newWorld(t)
		w.putOld()
		asked := make(chan bool)
		release := make(chan bool)
		w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
			asked <- true
			<-release
			return true
		}
		ctx, stop := context.WithCancel(t.Context())
		plain := w.command("--secret", name)
		cmd := exec.CommandContext(ctx, plain.Path, plain.Args[1:]...)
		cmd.Env = plain.Env
		cmd.Cancel = func() error { return cmd.Process.Signal(sig) }
		go func() {
			<-asked
			stop()
		}()
		o := w.wait(cmd)
		close(release)
		want := fmt.Sprintf("level=ERROR msg=\"patching secret shop/ecr-credentials: %s signal received\" hint=%q", sig, "the run was stopped from outside; the Secret is as it was, unless the API server had just taken the patch")
		if o.code != exitFailure || o.last() != want || o.took > 10*time.Second {
			t.Errorf("%v: exit %d after %v\n got %s\nwant %s", sig, o.code, o.took, o.last(), want)
		}
	}
}

func TestDeadlineEndsTheRun(t *testing.T) {
	w := newWorld(t)
	release := make(chan bool)
	defer close(release)
	w.ecr.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
		<-release
		return true
	}
	o := w.run("--timeout", "300ms")
	want := `level=ERROR msg="getting an ECR token in eu-central-1: the run's deadline of 300ms (--timeout) has passed" hint="find out what is slow, or raise --timeout"`
	if o.code != exitFailure || o.last() != want || o.took > 5*time.Second {
		t.Errorf("exit %d after %v\n got %s\nwant %s", o.code, o.took, o.last(), want)
	}
}

func TestVersionAndHelpGoToStdout(t *testing.T) {
	for arg, want := range map[string]string{"--version": "ecr-refresher 1.2.3-test\n", "--help": usage, "-h": usage} {
		out, err := exec.Command(program, arg).Output()
		if err != nil || string(out) != want {
			t.Errorf("%s: %v: %s", arg, err, out)
		}
	}
}

// TestHelpAndREADMEShowTheSameFlags holds together the usage text, the README's table and the flags that are parsed.
func TestHelpAndREADMEShowTheSameFlags(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := regexp.MustCompile("(?m)^\\| `--([a-z-]+)` \\| (.+) \\| (.+) \\|$").FindAllStringSubmatch(string(readme), -1)
	var table, help []string
	for _, row := range rows {
		line := row[1] + ": " + row[2]
		if row[3] == "required" {
			line += " (required)"
		} else if row[3] != "-" {
			line += " (default: " + row[3] + ")"
		}
		table = append(table, strings.ReplaceAll(line, "`", ""))
	}
	for _, line := range regexp.MustCompile(`(?m)^  --([a-z-]+) +(.+)$`).FindAllStringSubmatch(usage, -1) {
		help = append(help, line[1]+": "+line[2])
	}
	if len(help) != 13 || !slices.Equal(table, help) {
		t.Errorf("README.md:\n%s\n--help:\n%s", strings.Join(table, "\n"), strings.Join(help, "\n"))
	}
	w := newWorld(t)
	for _, line := range help {
		flag, _, _ := strings.Cut(line, ":")
		if flag == "help" || flag == "version" {
			continue
		}
		if o := w.run("--"+flag+"=", "stray"); o.code != exitUsage || strings.Contains(o.stderr, "unknown flag") {
			t.Errorf("--%s: exit %d: %s", flag, o.code, o.stderr)
		}
	}
}

func TestRedactorKnowsTheFormsInWhichServersEcho(t *testing.T) {
	r := &redactor{}
	r.add("s3cr+t/\"key\"", "", "abc")
	for text, want := range map[string]string{
		`a s3cr+t/"key" b`:             "a [redacted] b",
		`a s3cr+t/\"key\" b`:           "a [redacted] b",
		"a czNjcit0LyJrZXki b":         "a [redacted] b",
		"a s3cr%2Bt%2F%22key%22 b":     "a [redacted] b",
		"abc is too short to be known": "abc is too short to be known",
	} {
		if got := r.text(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestProgramIsStaticallyLinked(t *testing.T) {
	f, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("the program has a %v segment: it needs a loader or a library, and the image has neither", p.Type)
		}
	}
	info, err := os.Stat(program)
	if err != nil {
		t.Fatal(err)
	}
	const most = 8_800_000 // bytes
	if info.Size() > most {
		t.Errorf("the program has %d bytes, more than %d", info.Size(), most)
	}
}

func TestChartIsOfThisVersionAndItsTableIsFresh(t *testing.T) {
	chart, err := os.ReadFile("chart/Chart.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\nversion: " + version + "\n", "\nappVersion: \"" + version + "\"\n"} {
		if !strings.Contains(string(chart), want) {
			t.Errorf("chart/Chart.yaml lacks %q", want)
		}
	}
	if out, err := exec.Command("go", "run", "./testdata/chartdoc", "-check").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// startRaw serves one answer, byte by byte as it is, to every request over TLS; the connection stays open.
func (w *world) startRaw(answer func(*http.Request) string) (address string) {
	w.t.Helper()
	return w.startTLS(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		conn, _, err := rw.(http.Hijacker).Hijack()
		if err != nil {
			w.t.Error(err)
			return
		}
		w.t.Cleanup(func() { conn.Close() })
		fmt.Fprint(conn, answer(r))
	})).URL
}

func TestSwitchOfProtocolsDoesNotHoldTheRun(t *testing.T) {
	const upgrade = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"
	for name, arrange := range map[string]func(w *world, address string){
		"Kubernetes": func(w *world, address string) { w.setAPI(address) },
		"AWS": func(w *world, address string) {
			w.env["AWS_ENDPOINT_URL_ECR"], w.env["AWS_MAX_ATTEMPTS"] = address, "1"
		},
	} {
		w := newWorld(t)
		arrange(w, w.startRaw(func(*http.Request) string { return upgrade }))
		cmd := w.command("--secret", "ecr-credentials", "--timeout", "2s")
		watchdog := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		o := w.wait(cmd)
		watchdog.Stop()
		if o.code != exitFailure || !strings.Contains(o.last(), "HTTP 101 Switching Protocols") {
			t.Errorf("%s: exit %d after %v: %s", name, o.code, o.took, o.last())
		}
	}
}

// net/http quotes a Content-Length that it cannot read, and the SDK keeps the request ID: both can be an echo of a header.
func TestEchoedHeadersAreNotPrinted(t *testing.T) {
	w := newWorld(t)
	w.setAPI(w.startRaw(func(r *http.Request) string {
		return "HTTP/1.1 200 OK\r\nContent-Length: " + r.Header.Get("Authorization") + "\r\n\r\n"
	}))
	if o := w.run("--timeout", "2s"); o.code != exitFailure || !strings.Contains(o.last(), "[redacted]") {
		t.Errorf("exit %d: %s", o.code, o.stderr)
	}
	for _, header := range []string{"200 OK\r\nContent-Length: ", "400 Bad Request\r\nContent-Length: 33\r\nX-Amzn-Requestid: "} {
		w := newWorld(t)
		w.env["AWS_MAX_ATTEMPTS"] = "1"
		w.env["AWS_ENDPOINT_URL_ECR"] = w.startRaw(func(r *http.Request) string {
			return "HTTP/1.1 " + header + r.Header.Get("X-Amz-Security-Token") + "\r\n\r\n" + `{"__type":"Foo","message":"bar0"}`
		})
		if o := w.run("--timeout", "2s"); o.code != exitFailure || !strings.Contains(o.last(), "[redacted]") {
			t.Errorf("exit %d: %s", o.code, o.stderr)
		}
	}
}

func TestPasswordsInURLsAreNotPrinted(t *testing.T) {
	w := newWorld(t)
	w.env["AWS_ENDPOINT_URL_ECR"] = "htps://user:hunter2@aws.example"
	w.env["HTTP_PROXY"] = "http://user:hunter 2@proxy"
	o := w.run("--api-server", "https://user:hunter2@kubernetes.example", "--registry", "https://AWS:hunter2@registry.example")
	if o.code != exitUsage || strings.Contains(o.stderr, "hunter") {
		t.Errorf("exit %d: %s", o.code, o.stderr)
	}
	for _, want := range []string{"https://[redacted]@kubernetes.example", "https://[redacted]@registry.example", "htps://[redacted]@aws.example", "environment HTTP_PROXY: it is not a URL"} {
		if !strings.Contains(o.stderr, want) {
			t.Errorf("no %q in %s", want, o.stderr)
		}
	}
}
