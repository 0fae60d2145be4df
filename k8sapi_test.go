package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"ecr-refresher/testdata/standin"
)

func TestInClusterServerIsBuiltFromHostAndPort(t *testing.T) {
	for _, c := range []struct{ host, port, want, err string }{
		{"10.43.0.1", "443", "https://10.43.0.1:443", ""},
		{"fd00::1", "6443", "https://[fd00::1]:6443", ""},
		{"kubernetes.default.svc", "443", "https://kubernetes.default.svc:443", ""},
		{"", "443", "", "not both set"},
		{"10.43.0.1", "", "", "not both set"},
		{"10.43.0.1", "https", "", "not a port number"},
		{"10.43.0.1", "0", "", "not a port number"},
		{"10.43.0.1", "65536", "", "not a port number"},
		{"10.43.0.1/evil", "443", "", "neither an IP address nor a host name"},
		{"user@evil", "443", "", "neither an IP address nor a host name"},
	} {
		u, err := inClusterServer(c.host, c.port)
		checkError(t, c.host+" "+c.port, err, c.err)
		if err == nil && u.String() != c.want {
			t.Errorf("%s %s: got %s, want %s", c.host, c.port, u, c.want)
		}
	}
}

func TestAPIServerMustBeAnHTTPSBaseURL(t *testing.T) {
	for value, wantErr := range map[string]string{
		"https://10.0.0.1:6443":                  "",
		"https://[fd00::1]:6443":                 "",
		"https://rancher.example/k8s/clusters/c": "",
		"http://10.0.0.1:6443":                   "https://",
		"10.0.0.1:6443":                          "not a URL",
		"https://":                               "no host",
		"https://user:pass@10.0.0.1":             "plain base URL",
		"https://10.0.0.1:99999":                 "no valid port",
		"https://10.0.0.1?x=1":                   "plain base URL",
		"https://10.0.0.1#x":                     "plain base URL",
		"":                                       "https://",
	} {
		_, err := parseAPIServer(value)
		checkError(t, value, err, wantErr)
	}
}

// checkError checks that err holds want, or that there is none when want is empty.
func checkError(t *testing.T, what string, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("%s: unexpected error: %v", what, err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("%s: got error %v, want one with %q", what, err, want)
	}
}

func TestRetryAfterIsReadInBothForms(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"7":                             7 * time.Second,
		"-7":                            0,
		"soon":                          0,
		"99999999999999999999":          0,
		"Fri, 02 Jan 2026 03:04:35 GMT": 30 * time.Second,
		"Fri, 02 Jan 2026 03:00:00 GMT": 0,
	} {
		if got := parseRetryAfter(value, now); got != want {
			t.Errorf("%q: got %v, want %v", value, got, want)
		}
	}
}

func TestServerMessagesAreMadeSafe(t *testing.T) {
	redact := &redactor{}
	redact.add("known-secret")
	for message, want := range map[string]string{
		"plain": "plain",
		"line\nlevel=INFO msg=\"secret patched\"\r\x1b[31m\u2028red": "line level=INFO msg=\"secret patched\" [31m red",
		"with known-secret inside":                                   "with [redacted] inside",
		"base64 a25vd24tc2VjcmV0 inside":                             "base64 [redacted] inside",
		` "" is invalid: patch: Invalid value: "{\"data\":{\"password\":\"aHVudGVyMg==\"}}": illegal base64`: `"" is invalid: patch: Invalid value: [withheld]`,
		"unknown data " + strings.Repeat("QUJD", 20) + " end":                                                "unknown data [withheld] end",
		strings.Repeat("x y", 200): strings.Repeat("x y", 200)[:maxMessage] + "...",
		// The secret lies across the place of truncation: it must be gone before.
		strings.Repeat("a ", maxMessage/2-3) + "known-secret": strings.TrimSuffix(strings.Repeat("a ", maxMessage/2-3)+"[redac...", ""),
	} {
		if got := cleanMessage(message, redact); got != want {
			t.Errorf("%q:\n got %q\nwant %q", message, got, want)
		}
	}
}

func FuzzParseStatus(f *testing.F) {
	for _, seed := range []string{
		`{"kind":"Status","reason":"NotFound","message":"secrets \"x\" not found","details":{"name":"x","kind":"secrets"},"code":404}`,
		`{"kind":"Status","message":"a known-secret\nb","details":{"causes":[{"field":"type"}]}}`,
		`{"kind":"Status","details":null}`, `{"kind":7}`, `<html>502</html>`, ``, `[]`, `{"kind":"Status","message":"\u0000\u202e"}`,
	} {
		f.Add(404, "5", []byte(seed))
	}
	f.Fuzz(func(t *testing.T, code int, retryAfter string, body []byte) {
		redact := &redactor{}
		redact.add("known-secret")
		e := parseStatus(code, retryAfter, body, redact)
		text := e.Error()
		if e.Code != code || e.RetryAfter < 0 {
			t.Errorf("code %d became %d, Retry-After %v", code, e.Code, e.RetryAfter)
		}
		if strings.Contains(text, "known-secret") || strings.ContainsFunc(text, unicode.IsControl) || len([]rune(text)) > 2*maxMessage+100 {
			t.Errorf("unsafe error text %q", text)
		}
	})
}

// newTestClient returns a client of the world's API server that notes its waits instead of waiting.
func newTestClient(w *world) (c *kubeClient, waits *[]time.Duration, logged *strings.Builder) {
	w.t.Helper()
	server, err := url.Parse(w.api.URL)
	if err != nil {
		w.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(w.ca.PEM())
	waits, logged = &[]time.Duration{}, &strings.Builder{}
	c = newKubeClient(w.t.Context(), &settings{apiServer: server, apiServerRoots: roots, serviceAccountDir: w.mount, namespace: ns, secret: name},
		&redactor{}, slog.New(slog.NewTextHandler(logged, nil)))
	c.sleep = func(_ context.Context, d time.Duration) error {
		*waits = append(*waits, d)
		return nil
	}
	return c, waits, logged
}

var testContent = secretContent{
	dockerConfig: []byte(`{"auths":{"r":{"auth":"QVdTOng="}}}`),
	annotations:  map[string]string{"ecr-refresher/expires-at": "2026-01-01T00:00:00Z"},
}

func TestMergePatchHoldsWhatChangesAndNothingElse(t *testing.T) {
	w := newWorld(t)
	w.putOld()
	c, _, _ := newTestClient(w)
	created, err := c.writeSecret(t.Context(), testContent)
	if err != nil || created {
		t.Fatalf("created %v, error %v", created, err)
	}
	requests := w.k8s.Requests()
	if len(requests) != 1 {
		t.Fatalf("%d requests", len(requests))
	}
	r := requests[0]
	if got := r.Method + " " + r.URL.String(); got != "PATCH /api/v1/namespaces/shop/secrets/ecr-credentials?fieldManager=ecr-refresher&fieldValidation=Strict" {
		t.Error(got)
	}
	for header, want := range map[string]string{
		"Authorization": "Bearer " + saToken,
		"Content-Type":  "application/merge-patch+json",
		"Accept":        "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json",
		"User-Agent":    "ecr-refresher/" + version,
	} {
		if got := r.Header.Get(header); got != want {
			t.Errorf("%s: got %q, want %q", header, got, want)
		}
	}
	want := `{"metadata":{"annotations":{"ecr-refresher/expires-at":"2026-01-01T00:00:00Z"}},"type":"kubernetes.io/dockerconfigjson","data":{".dockerconfigjson":"eyJhdXRocyI6eyJyIjp7ImF1dGgiOiJRVmRUT25nPSJ9fX0="}}`
	if string(r.Body) != want {
		t.Errorf("body\n got %s\nwant %s", r.Body, want)
	}
	s := w.secret()
	if s.Metadata.Labels["team"] != "web" || s.Metadata.Annotations["note"] != "keep me" || string(s.Data["other"]) != "keep" {
		t.Errorf("the patch lost something of others: %+v", s)
	}
}

func TestMissingSecretIsCreatedByName(t *testing.T) {
	w := newWorld(t)
	c, _, _ := newTestClient(w)
	created, err := c.writeSecret(t.Context(), testContent)
	if err != nil || !created {
		t.Fatalf("created %v, error %v", created, err)
	}
	requests := w.k8s.Requests()
	if len(requests) != 2 || requests[1].Method != http.MethodPatch || requests[1].Header.Get("Content-Type") != "application/apply-patch+yaml" {
		t.Fatalf("%d requests, want a merge patch and an apply", len(requests))
	}
	s := w.secret()
	if s.Type != dockerConfigType || s.Metadata.Labels["app.kubernetes.io/managed-by"] != "ecr-refresher" || string(s.Data[".dockerconfigjson"]) != string(testContent.dockerConfig) {
		t.Errorf("created %+v", s)
	}
}

func TestSecretThatSomebodyElseCreatesMeanwhileIsPatched(t *testing.T) {
	w := newWorld(t)
	w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
		if n == 2 { // between the merge patch and the apply
			w.putOld()
			standin.StatusError(rw, http.StatusConflict, "AlreadyExists", `secrets "ecr-credentials" already exists`)
			return true
		}
		return false
	}
	c, _, _ := newTestClient(w)
	if created, err := c.writeSecret(t.Context(), testContent); err != nil || created {
		t.Fatalf("created %v, error %v", created, err)
	}
	if s := w.secret(); s.Metadata.Labels["team"] != "web" || string(s.Data[".dockerconfigjson"]) != string(testContent.dockerConfig) {
		t.Errorf("got %+v", s)
	}
}

func TestTransientRefusalsAreTriedAgain(t *testing.T) {
	answer := func(code int, retryAfter string) func(http.ResponseWriter) {
		return func(rw http.ResponseWriter) {
			if retryAfter != "" {
				rw.Header().Set("Retry-After", retryAfter)
			}
			rw.WriteHeader(code)
		}
	}
	for _, c := range []struct {
		name     string
		answer   func(http.ResponseWriter)
		min, max time.Duration // of the first wait
	}{
		{"500", answer(500, ""), 750 * time.Millisecond, 1250 * time.Millisecond},
		{"503 with Retry-After", answer(503, "4"), 4750 * time.Millisecond, 5250 * time.Millisecond},
		{"429 with Retry-After", answer(429, "2"), 2750 * time.Millisecond, 3250 * time.Millisecond},
		{"429", answer(429, ""), 750 * time.Millisecond, 1250 * time.Millisecond},
		{"connection reset", func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, 750 * time.Millisecond, 1250 * time.Millisecond},
		{"401", answer(401, ""), 750 * time.Millisecond, 1250 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.putOld()
			w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				if n == 1 {
					c.answer(rw)
				}
				return n == 1
			}
			client, waits, logged := newTestClient(w)
			if _, err := client.writeSecret(t.Context(), testContent); err != nil {
				t.Fatal(err)
			}
			if len(*waits) != 1 || (*waits)[0] < c.min || (*waits)[0] > c.max {
				t.Errorf("waits %v, want one in %v..%v", *waits, c.min, c.max)
			}
			if !strings.Contains(logged.String(), "trying the API server again") {
				t.Errorf("logged %q", logged)
			}
		})
	}
}

func TestTriesEnd(t *testing.T) {
	for _, c := range []struct {
		code, wantTries int
		wantErr         string
	}{
		{503, maxAttempts, "(tried 6 times)"},
		{401, 2, "HTTP 401 Unauthorized"},
		{400, 1, "HTTP 400 Bad Request"},
		{403, 1, "HTTP 403 Forbidden"},
		{409, 1, "HTTP 409 Conflict"},
		{415, 1, "HTTP 415 Unsupported Media Type"},
		{422, 1, "HTTP 422 Unprocessable Entity"},
	} {
		w := newWorld(t)
		w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
			standin.StatusError(rw, c.code, "Some", "text")
			return true
		}
		client, waits, _ := newTestClient(w)
		_, err := client.writeSecret(t.Context(), testContent)
		checkError(t, fmt.Sprint(c.code), err, c.wantErr)
		if got := len(w.k8s.Requests()); got != c.wantTries || len(*waits) != c.wantTries-1 {
			t.Errorf("%d: %d tries and %d waits, want %d tries", c.code, got, len(*waits), c.wantTries)
		}
		if se, ok := errors.AsType[*statusError](err); !ok || se.Code != c.code {
			t.Errorf("%d: no statusError with that code in %v", c.code, err)
		}
	}
}

func TestWaitBeyondTheDeadlineEndsTheRunAtOnce(t *testing.T) {
	w := newWorld(t)
	w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
		rw.Header().Set("Retry-After", "3600")
		rw.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client, waits, _ := newTestClient(w)
	_, err := client.writeSecret(ctx, testContent)
	checkError(t, "429", err, "would be past the deadline of --timeout")
	if len(*waits) != 0 {
		t.Errorf("it waited %v", *waits)
	}
}

func TestTokenIsReadPerAttempt(t *testing.T) {
	w := newWorld(t)
	w.putOld()
	w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
		if n == 1 { // the old token has just ended, the kubelet writes the new one
			w.k8s.SetTokens("rotated-token")
			w.writeMount("rotated-token\n")
		}
		return false
	}
	client, _, _ := newTestClient(w)
	if _, err := client.writeSecret(t.Context(), testContent); err != nil {
		t.Fatal(err)
	}
	var sent []string
	for _, r := range w.k8s.Requests() {
		sent = append(sent, r.Header.Get("Authorization"))
	}
	if want := []string{"Bearer " + saToken, "Bearer rotated-token"}; !slices.Equal(sent, want) {
		t.Errorf("sent %q, want %q", sent, want)
	}
}

func TestOnlyThisSecretsMetadataIsSuccess(t *testing.T) {
	object := func(kind, namespace, name string) string {
		b, _ := json.Marshal(map[string]any{"kind": kind, "metadata": map[string]any{"namespace": namespace, "name": name}})
		return string(b)
	}
	for body, wantErr := range map[string]string{
		object("PartialObjectMetadata", ns, name):    "",
		object("Secret", ns, name):                   "",
		object("PartialObjectMetadata", ns, "other"): "not the Kubernetes API's",
		object("PartialObjectMetadata", "x", name):   "not the Kubernetes API's",
		object("Status", ns, name):                   "not the Kubernetes API's",
		"":                                           "not the Kubernetes API's",
		"{}":                                         "not the Kubernetes API's",
		"<html>Please log in</html>":                 "not the Kubernetes API's",
		object("Secret", ns, name) + strings.Repeat(" ", maxBody): "not the Kubernetes API's",
	} {
		w := newWorld(t)
		w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
			fmt.Fprint(rw, body)
			return true
		}
		client, _, _ := newTestClient(w)
		_, err := client.writeSecret(t.Context(), testContent)
		checkError(t, fmt.Sprintf("%.80q", body), err, wantErr)
	}
}

// Each refusal with the answer of the stand-in, which is the real server's, and the cure that is named.
func TestRefusalsNameTheirCure(t *testing.T) {
	forbid := func(w *world) { w.k8s.SetRules() }
	for _, c := range []struct {
		name          string
		setup         func(*world)
		wantErr, hint string
	}{
		{"forbidden", func(w *world) { w.putOld(); forbid(w) }, "patching secret shop/ecr-credentials: HTTP 403 Forbidden: secrets \"ecr-credentials\" is forbidden: User",
			"{apiGroups: [''], resources: [secrets], resourceNames: [ecr-credentials], verbs: [patch, create]}"},
		{"missing, and create forbidden", func(w *world) {
			w.k8s.SetRules(standin.Rule{Namespace: ns, Verbs: []string{"patch"}, ResourceNames: []string{name}})
		}, "secret shop/ecr-credentials does not exist, and creating it was refused", "kubectl create secret docker-registry ecr-credentials -n shop"},
		{"wrong type", func(w *world) { w.put("Opaque", map[string]any{"a": "Yg=="}) }, "type: Invalid value: [withheld]", "type is not kubernetes.io/dockerconfigjson"},
		{"immutable", func(w *world) {
			w.k8s.Put(ns, name, map[string]any{"metadata": map[string]any{}, "type": dockerConfigType, "immutable": true, "data": map[string]any{".dockerconfigjson": oldConfig}})
		}, "field is immutable when `immutable` is set", "marked immutable"},
		{"refused by a webhook", func(w *world) {
			w.putOld()
			w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				standin.StatusError(rw, http.StatusForbidden, "Forbidden", `admission webhook "policy.example" denied the request: no Secrets here`)
				return true
			}
		}, "denied the request: no Secrets here", "not a matter of RBAC"},
		{"an answer without content", func(w *world) {
			w.putOld()
			w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				rw.WriteHeader(http.StatusNoContent)
				return true
			}
		}, "HTTP 204 No Content", "something other than the API server answers"},
		{"token not accepted", func(w *world) { w.k8s.SetTokens("other") }, "HTTP 401 Unauthorized: Unauthorized", "does not accept the token"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			c.setup(w)
			before := w.secret()
			client, _, _ := newTestClient(w)
			_, err := client.writeSecret(t.Context(), testContent)
			checkError(t, "error", err, c.wantErr)
			if !strings.Contains(hintOf(err), c.hint) {
				t.Errorf("hint %q, want one with %q", hintOf(err), c.hint)
			}
			if after := w.secret(); (before == nil) != (after == nil) || before != nil && before.Metadata.ResourceVersion != after.Metadata.ResourceVersion {
				t.Errorf("the Secret changed: %+v to %+v", before, after)
			}
		})
	}
}

func TestMissingNamespaceIsToldFromMissingSecret(t *testing.T) {
	w := newWorld(t)
	w.k8s.SetRules(standin.Rule{Namespace: "nowhere", Verbs: []string{"patch", "create"}})
	client, _, _ := newTestClient(w)
	client.namespace = "nowhere"
	_, err := client.writeSecret(t.Context(), testContent)
	checkError(t, "error", err, `creating secret nowhere/ecr-credentials: HTTP 404 Not Found: namespaces "nowhere" not found`)
	if !strings.Contains(hintOf(err), "the namespace nowhere does not exist") {
		t.Errorf("hint %q", hintOf(err))
	}
}

func TestOnlyTheServersWordThatTheSecretIsMissingCreatesIt(t *testing.T) {
	for _, body := range []string{
		`{"kind":"Status","reason":"NotFound","details":{"name":"shop","kind":"namespaces"},"code":404}`,
		`{"kind":"Status","reason":"NotFound","details":{"name":"other","kind":"secrets"},"code":404}`,
		`{"kind":"Status","reason":"NotFound","code":404}`, // no such API path
		`404 page not found`,
	} {
		w := newWorld(t)
		w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
			rw.WriteHeader(http.StatusNotFound)
			fmt.Fprint(rw, body)
			return n == 1
		}
		client, _, _ := newTestClient(w)
		_, err := client.writeSecret(t.Context(), testContent)
		checkError(t, body, err, "patching secret shop/ecr-credentials: HTTP 404 Not Found")
		if n := len(w.k8s.Requests()); n != 1 {
			t.Errorf("%s: %d requests, want 1", body, n)
		}
	}
}
