package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

const (
	fieldManager = "ecr-refresher"

	// Media types of the two patches, and the answer that is asked for: the object's metadata alone, so that the
	// server does not send the Secret's content back.
	mergePatch   = "application/merge-patch+json"
	applyPatch   = "application/apply-patch+yaml"
	acceptHeader = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"

	dialTimeout    = 5 * time.Second
	tlsTimeout     = 5 * time.Second
	attemptTimeout = 15 * time.Second // one request with its whole answer
	maxAttempts    = 6                // 1+2+4+8+8 s of waiting in between: longer than an API server takes to restart
	maxBackoff     = 8 * time.Second
	maxBody        = 4 << 20  // bytes: a whole Secret (1 MiB of data, base64) with its managed fields fits
	maxHeader      = 64 << 10 // bytes of all header lines
	maxMessage     = 400      // runes kept of a server's message: a pod's termination message has 2048 bytes in all
)

// kubeClient writes one Secret through the Kubernetes API. It is plain net/http because the whole conversation is one
// PATCH, at most three: client-go would add 20 MB of binary and a cache, informers and credential plug-ins that a
// single request has no use for. See https://kubernetes.io/docs/reference/using-api/api-concepts/.
type kubeClient struct {
	server            *url.URL // https only: the bearer token must not travel in clear
	serviceAccountDir string
	namespace, name   string // of the Secret
	dryRun            bool
	http              *http.Client
	redact            *redactor
	log               *slog.Logger
	sleep             func(context.Context, time.Duration) error
}

// newKubeClient returns a client that trusts the certificates in roots only, and neither uses a proxy nor follows a
// redirect: either would hand the bearer token to another host. It starts to connect at once.
func newKubeClient(ctx context.Context, s *settings, redact *redactor, log *slog.Logger) *kubeClient {
	return &kubeClient{
		server:            s.apiServer,
		serviceAccountDir: s.serviceAccountDir,
		namespace:         s.namespace,
		name:              s.secret,
		dryRun:            s.dryRun,
		redact:            redact,
		log:               log,
		sleep:             sleepContext,
		http: boundedClient(attemptTimeout, &http.Transport{
			DialTLSContext:         connectAhead(ctx, s.apiServer, s.apiServerRoots),
			MaxResponseHeaderBytes: maxHeader,
		}),
	}
}

// connectAhead starts to connect to the server, and returns a dial function whose first call gets that connection: its
// handshake, a quarter of a run, passes while AWS answers. A connection that has waited for long is not used, since the
// server may have closed it.
func connectAhead(ctx context.Context, server *url.URL, roots *x509.CertPool) func(ctx context.Context, network, addr string) (net.Conn, error) {
	dialer := &tls.Dialer{NetDialer: &net.Dialer{Timeout: dialTimeout}, Config: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, dialTimeout+tlsTimeout)
		defer cancel()
		conn, err := dialer.DialContext(ctx, network, addr)
		if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
			err = http.ErrSchemeMismatch // as net/http's own dial function says it of plain HTTP
		}
		return conn, err
	}
	type ready struct {
		conn net.Conn
		at   time.Time
	}
	ahead := make(chan ready, 1)
	go func() {
		defer close(ahead)
		if conn, err := dial(ctx, "tcp", net.JoinHostPort(server.Hostname(), cmp.Or(server.Port(), "443"))); err == nil {
			ahead <- ready{conn, time.Now()}
		}
	}()
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		if first, ok := <-ahead; ok {
			if time.Since(first.at) < dialTimeout {
				return first.conn, nil
			}
			first.conn.Close()
		}
		return dial(ctx, network, addr)
	}
}

// boundedClient returns a client whose requests end: it follows no redirect, since a token must not travel to another
// host, and its transport bounds the answers.
func boundedClient(timeout time.Duration, transport http.RoundTripper) *http.Client {
	return &http.Client{
		Timeout:       timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport:     boundedTransport{transport},
	}
}

// boundedTransport fails the reading of a body beyond maxBody bytes, rather than ending it: a cut answer may pass for a
// whole one. It refuses the answer 101, which nobody asked for: net/http then hands over the bare connection as the body,
// and no timeout ends the reading of it.
type boundedTransport struct{ next http.RoundTripper }

func (t boundedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		resp.Body.Close()
		return nil, errors.New("the answer is HTTP 101 Switching Protocols, which nobody asked for")
	}
	resp.Body = http.MaxBytesReader(nil, resp.Body, maxBody)
	return resp, nil
}

func sleepContext(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// inClusterServer returns the API server's URL from the variables that the kubelet sets in every container. Unlike the
// name kubernetes.default.svc it needs no cluster DNS.
func inClusterServer(host, port string) (*url.URL, error) {
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not both set: outside a pod, give --api-server")
	}
	if !isPort(port) {
		return nil, fmt.Errorf("KUBERNETES_SERVICE_PORT %q is not a port number", port)
	}
	if net.ParseIP(host) == nil && !isDNSName(host) {
		return nil, fmt.Errorf("KUBERNETES_SERVICE_HOST %q is neither an IP address nor a host name", host)
	}
	return &url.URL{Scheme: "https", Host: net.JoinHostPort(host, port)}, nil
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// parseAPIServer parses the value of --api-server.
func parseAPIServer(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, errors.New("not a URL")
	case u.Scheme != "https":
		return nil, errors.New("must start with https://, so that the service-account token never travels in clear")
	case u.Hostname() == "":
		return nil, errors.New("has no host")
	case u.Port() != "" && !isPort(u.Port()):
		return nil, errors.New("has no valid port")
	case u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("must be a plain base URL, without user, query and fragment")
	}
	return u, nil
}

// readServiceAccountFile returns the trimmed content of a file of the service-account mount.
func readServiceAccountFile(dir, name string) (string, error) {
	path := filepath.Join(dir, name)
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err // *fs.PathError: names the file
	}
	s := strings.TrimSpace(string(b))
	if s == "" {
		return "", fmt.Errorf("%s is empty", path)
	}
	return s, nil
}

// readToken returns the bearer token, which has to fit into a header.
func readToken(dir string) (string, error) {
	token, err := readServiceAccountFile(dir, "token")
	if err == nil && strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s does not hold a token", filepath.Join(dir, "token"))
	}
	return token, err
}

// secretContent is what a run writes into the Secret.
type secretContent struct {
	dockerConfig []byte            // JSON of .dockerconfigjson
	annotations  map[string]string // set beside those that are there
}

// secretPatch is the body of both patches. APIVersion, Kind, Name and Labels belong to the apply alone, which has to
// describe a whole object; a merge patch says nothing but what is to change.
type secretPatch struct {
	APIVersion string            `json:"apiVersion,omitempty"`
	Kind       string            `json:"kind,omitempty"`
	Metadata   secretMetadata    `json:"metadata"`
	Type       string            `json:"type"`
	Data       map[string][]byte `json:"data"`
}

type secretMetadata struct {
	Name        string            `json:"name,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations"`
}

// writeSecret patches the Secret, and creates it when it does not exist.
//
// The patch names the Secret's type although it never changes it: on a Secret of another type the server then refuses
// the patch, instead of storing data that no kubelet reads.
//
// The Secret is created by a server-side apply and not by a POST, since an apply is authorised by the object's name: a
// Role can allow to create exactly this Secret.
func (c *kubeClient) writeSecret(ctx context.Context, content secretContent) (created bool, err error) {
	patch := secretPatch{
		Metadata: secretMetadata{Annotations: content.annotations},
		Type:     "kubernetes.io/dockerconfigjson",
		Data:     map[string][]byte{".dockerconfigjson": content.dockerConfig},
	}
	whole := patch
	whole.APIVersion, whole.Kind = "v1", "Secret"
	whole.Metadata.Name = c.name
	whole.Metadata.Labels = map[string]string{"app.kubernetes.io/managed-by": "ecr-refresher"}

	err = c.patch(ctx, mergePatch, patch)
	if !c.isMissing(err) {
		return false, c.explain("patching", err)
	}
	err = c.patch(ctx, applyPatch, whole)
	if se, ok := errors.AsType[*statusError](err); ok {
		switch se.Code {
		case http.StatusConflict: // someone else created it in between
			return false, c.explain("patching", c.patch(ctx, mergePatch, patch))
		case http.StatusForbidden:
			if !strings.Contains(se.Message, " cannot ") {
				break // explained below: no right is missing
			}
			return false, withHint(fmt.Errorf("secret %s/%s does not exist, and creating it was refused: %w", c.namespace, c.name, err),
				fmt.Sprintf("create it once: kubectl create secret docker-registry %s -n %s --docker-server=REGISTRY --docker-username=AWS --docker-password=placeholder; or allow it to be created: %s",
					c.name, c.namespace, c.rbacRule("patch, create")))
		}
	}
	return err == nil, c.explain("creating", err)
}

// isMissing reports whether err is the API server's word that the Secret does not exist, rather than a 404 of
// something else.
func (c *kubeClient) isMissing(err error) bool {
	se, ok := errors.AsType[*statusError](err)
	return ok && se.Code == http.StatusNotFound && se.Reason == "NotFound" && se.Kind == "secrets" && se.Name == c.name
}

// patch sends one patch until it is taken, refused for good, or out of tries. Transport errors, 429 and 5xx are tried
// again, since a patch can be repeated without harm; so is the first 401, because the kubelet may have rotated the
// token in between.
func (c *kubeClient) patch(ctx context.Context, contentType string, patch secretPatch) error {
	body, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	unauthorized := 0
	starting := false // the API server did not answer, or failed, at the attempt before
	for attempt := 1; ; attempt++ {
		err := c.send(ctx, contentType, body)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		delay := min(time.Second<<(attempt-1), maxBackoff)
		delay = delay*3/4 + rand.N(delay/2)
		se, isStatus := errors.AsType[*statusError](err)
		switch {
		case isStatus && se.Code == http.StatusUnauthorized:
			if unauthorized++; unauthorized > 1 {
				return err
			}
		case isStatus && (se.Code == http.StatusTooManyRequests || se.Code >= 500):
			delay += se.RetryAfter
			starting = true
		case isStatus && se.Code == http.StatusForbidden && starting:
			// An API server that starts refuses everything until it has read its RBAC rules.
			starting = false
		case isStatus || !isTransient(err):
			return err
		default:
			starting = true
		}
		if attempt == maxAttempts {
			return fmt.Errorf("%w (tried %d times)", err, attempt)
		}
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < delay {
			return fmt.Errorf("%w (the next try, in %v, would be past the deadline of --timeout)", err, delay.Round(time.Second))
		}
		c.log.Warn("trying the API server again", "error", c.redact.text(err.Error()), "in", delay.Round(time.Millisecond))
		if stopped := c.sleep(ctx, delay); stopped != nil {
			return fmt.Errorf("%w, while waiting to try again after: %w", stopped, err)
		}
	}
}

// transportError is a request that got no answer, or only a part of one.
type transportError struct {
	error
	redact *redactor
}

func (e *transportError) Error() string { return transportText(e.error.Error(), e.redact) }
func (e *transportError) Unwrap() error { return e.error }

// transportText is the text of a net/http error on one line, without what the server sent, which some of them quote.
func transportText(s string, redact *redactor) string {
	if before, _, found := strings.Cut(s, "malformed "); found {
		s = before + "the answer is not HTTP"
	}
	return oneLine(s, redact)
}

// newTransportError drops the method and the long URL that net/http puts around its errors: explain names the Secret,
// and the hint the server.
func newTransportError(err error, redact *redactor) error {
	if ue, ok := errors.AsType[*url.Error](err); ok {
		err = ue.Err
	}
	return &transportError{err, redact}
}

// isTransient tells a transport error that another try may cure from one that it will not: a certificate that does not
// verify, plain HTTP behind an https URL.
func isTransient(err error) bool {
	_, untrusted := errors.AsType[*tls.CertificateVerificationError](err)
	_, transport := errors.AsType[*transportError](err)
	return transport && !untrusted && !errors.Is(err, http.ErrSchemeMismatch)
}

// send makes one attempt. It returns nil only when the answer is the metadata of this very Secret: a captive portal
// answers 200 as well.
func (c *kubeClient) send(ctx context.Context, contentType string, body []byte) error {
	token, err := readToken(c.serviceAccountDir) // per attempt: the kubelet rotates it about hourly
	if err != nil {
		return fmt.Errorf("%w: %w", errNoToken, err)
	}
	c.redact.add(token)

	u := c.server.JoinPath("api", "v1", "namespaces", c.namespace, "secrets", c.name)
	query := url.Values{"fieldManager": {fieldManager}, "fieldValidation": {"Strict"}}
	if c.dryRun {
		query.Set("dryRun", "All")
	}
	u.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, u.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("Accept", acceptHeader)
	req.Header.Set("User-Agent", "ecr-refresher/"+version)

	resp, err := c.http.Do(req)
	if err != nil {
		return newTransportError(err, c.redact)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusCreated {
		return parseStatus(resp.StatusCode, resp.Header.Get("Retry-After"), answer, c.redact)
	}
	_, tooLong := errors.AsType[*http.MaxBytesError](err)
	if err != nil && !tooLong {
		return newTransportError(fmt.Errorf("the answer broke off: %w", err), c.redact)
	}
	var object struct {
		Kind     string
		Metadata struct{ Name, Namespace string }
	}
	if tooLong || json.Unmarshal(answer, &object) != nil ||
		object.Kind != "PartialObjectMetadata" && object.Kind != "Secret" ||
		object.Metadata.Name != c.name || object.Metadata.Namespace != c.namespace {
		return fmt.Errorf("%w: HTTP %d, but not with this Secret's metadata", errNotKubernetes, resp.StatusCode)
	}
	return nil
}

// errNoToken says that the token of the mount cannot be used.
var errNoToken = errors.New("reading the service-account token")

// errNotKubernetes says that a proxy, a captive portal or a wrong server answered.
var errNotKubernetes = errors.New("the answer is not the Kubernetes API's")

// statusError is a refusal by the API server, or by something in front of it.
type statusError struct {
	Code       int           // HTTP status code, whatever the body is
	Reason     string        // metav1.StatusReason such as NotFound; empty when the body is no metav1.Status
	Message    string        // the server's, made safe by cleanMessage
	Kind, Name string        // of the object that the server speaks of: details.kind is a resource such as "secrets"
	Fields     []string      // details.causes[].field
	RetryAfter time.Duration // zero when the server named none
}

func (e *statusError) Error() string {
	s := fmt.Sprintf("HTTP %d", e.Code)
	if text := http.StatusText(e.Code); text != "" {
		s += " " + text
	}
	switch {
	case e.Reason == "":
		s += ", and the body is not the Kubernetes API's"
	case e.Message != "":
		s += ": " + e.Message
	}
	return s
}

// parseStatus makes the error of a failed request from the HTTP code first, and from the body as far as it is a
// metav1.Status.
func parseStatus(code int, retryAfter string, body []byte, redact *redactor) *statusError {
	e := &statusError{Code: code, RetryAfter: parseRetryAfter(retryAfter, time.Now())}
	var status struct {
		Kind, Reason, Message string
		Details               struct {
			Kind, Name string
			Causes     []struct{ Field string }
		}
	}
	if json.Unmarshal(body, &status) != nil || status.Kind != "Status" {
		return e
	}
	e.Reason = cmp.Or(status.Reason, "Unknown") // a Status all the same: some have the code alone
	e.Message = cleanMessage(status.Message, redact)
	e.Kind, e.Name = status.Details.Kind, status.Details.Name
	for _, cause := range status.Details.Causes {
		e.Fields = append(e.Fields, cause.Field)
	}
	return e
}

// parseRetryAfter reads both forms of the header, seconds and date (RFC 9110, section 10.2.3); 0 when there is none.
func parseRetryAfter(s string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if date, err := http.ParseTime(s); err == nil {
		return max(0, date.Sub(now))
	}
	return 0
}

// cleanMessage makes a message of the API server fit for a log: without the secrets that this process knows and without
// what may be content of a Secret, on one line, at most maxMessage runes. The order matters: a secret that is
// truncated first would not be found any more.
func cleanMessage(s string, redact *redactor) string {
	s = redact.text(s)
	// The API machinery's field errors quote the value that they reject, which is the whole Secret when the patched one
	// does not decode.
	if before, _, found := strings.Cut(s, "Invalid value: "); found {
		s = before + "Invalid value: [withheld]"
	}
	// No name, address or id in a message is such a long run: it may be a Secret's data.
	s = regexp.MustCompile(`[A-Za-z0-9+/=]{48,}`).ReplaceAllString(s, "[withheld]")
	return oneLine(s, redact)
}

// oneLine makes a text fit for a log: without the secrets, which must go first since one that is truncated would not be
// found any more; with a space in place of control characters and line breaks, so that no server can forge a log line;
// and at most maxMessage runes of it.
func oneLine(s string, redact *redactor) string {
	var line []rune
	for _, r := range redact.text(s) {
		switch {
		case unicode.IsPrint(r) && r != ' ':
			line = append(line, r)
		case len(line) > 0 && line[len(line)-1] != ' ':
			line = append(line, ' ')
		}
		if len(line) > maxMessage {
			return string(line[:maxMessage]) + "..."
		}
	}
	return strings.TrimSpace(string(line))
}

// explain adds to an error of patch what was being done, on what, and how to cure it.
func (c *kubeClient) explain(doing string, err error) error {
	if err == nil {
		return nil
	}
	return withHint(fmt.Errorf("%s secret %s/%s: %w", doing, c.namespace, c.name, err), c.hint(err))
}

// rbacRule is the rule of a Role that allows verbs on this Secret and nothing else, as one line of YAML.
func (c *kubeClient) rbacRule(verbs string) string {
	return fmt.Sprintf("a Role in namespace %s with the rule {apiGroups: [''], resources: [secrets], resourceNames: [%s], verbs: [%s]}, bound to this pod's ServiceAccount",
		c.namespace, c.name, verbs)
}

// hint names the cure of an error of patch.
func (c *kubeClient) hint(err error) string {
	se, ok := errors.AsType[*statusError](err)
	if !ok {
		if errors.Is(err, errNoToken) {
			return fmt.Sprintf("it was there when the run began: does the pod still mount its token in %s, so that this user can read it?", c.serviceAccountDir)
		}
		if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
			return fmt.Sprintf("is this node's clock right? Else the certificate of %s must be renewed", c.server)
		}
		if _, untrusted := errors.AsType[*tls.CertificateVerificationError](err); untrusted {
			return fmt.Sprintf("the certificate of %s must be issued by the CA in %s/ca.crt and be valid for that address", c.server, c.serviceAccountDir)
		}
		if errors.Is(err, errNotKubernetes) || errors.Is(err, http.ErrSchemeMismatch) {
			return fmt.Sprintf("something other than the API server answers at %s: look for a proxy or a wrong --api-server", c.server)
		}
		return fmt.Sprintf("can this pod reach the API server at %s? Look for a network policy, a firewall, or a wrong --api-server", c.server)
	}
	switch {
	case se.Code >= 300 && se.Code < 400:
		return fmt.Sprintf("redirects are not followed, the token would go with them: %s must be the API server itself", c.server)
	case se.Reason == "" && se.Code < 500:
		return fmt.Sprintf("something other than the API server answers at %s: look for a proxy or a wrong --api-server", c.server)
	case se.Code == http.StatusUnauthorized:
		return fmt.Sprintf("the API server does not accept the token in %s: does the ServiceAccount still exist, and is the token this cluster's?", c.serviceAccountDir)
	case se.Code == http.StatusForbidden && !strings.Contains(se.Message, " cannot "):
		return "not a matter of RBAC: an admission policy, a quota or the namespace's end refused it, see the message"
	case se.Code == http.StatusForbidden:
		return fmt.Sprintf("grant %s; or is --namespace or --secret wrong?", c.rbacRule("patch, create"))
	case se.Code == http.StatusNotFound && se.Kind == "namespaces":
		return fmt.Sprintf("the namespace %s does not exist: correct --namespace, or create it", c.namespace)
	case se.Code == http.StatusNotFound:
		return fmt.Sprintf("is %s the API server's base URL?", c.server)
	case se.Code == http.StatusUnsupportedMediaType:
		return "the server does not know this kind of patch: is it a Kubernetes API server, 1.22 or newer?"
	case se.Code == http.StatusUnprocessableEntity && slices.Contains(se.Fields, "type"):
		return fmt.Sprintf("the Secret's type is not kubernetes.io/dockerconfigjson and cannot be changed: choose another --secret, or delete it (kubectl delete secret %s -n %s) and run again", c.name, c.namespace)
	case se.Code == http.StatusUnprocessableEntity && slices.Contains(se.Fields, "data") && strings.Contains(se.Message, "immutable"):
		return fmt.Sprintf("the Secret is marked immutable, which cannot be undone: delete it (kubectl delete secret %s -n %s) and run again", c.name, c.namespace)
	case se.Code == http.StatusUnprocessableEntity && slices.Contains(se.Fields, "data") && strings.Contains(se.Message, "Too long"):
		return "beside the Secret's other data there is no room for the token: choose another --secret, or give it fewer registries"
	case se.Code == http.StatusConflict:
		return "somebody else writes this Secret at the same time: the next run will try again"
	case se.Code == http.StatusUnprocessableEntity:
		return fmt.Sprintf("the Secret holds something that the API server rejects: look at it with kubectl get secret %s -n %s -o yaml, or delete it and run again", c.name, c.namespace)
	case se.Code == http.StatusTooManyRequests || se.Code >= 500:
		return "the API server is overloaded or not ready: the next run will try again"
	}
	return "the API server refused the patch: see its message"
}
