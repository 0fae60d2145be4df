package main

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ecr-refresher/testdata/standin"
)

var faultUpdate = flag.Bool("update", false, "let TestFaults rewrite testdata/faults/lines.golden and the README's table of faults")

// fault is one thing that goes wrong around a run of the compiled program, and what must come of it. The last line on
// stderr stands in testdata/faults/lines.golden.
type fault struct {
	name    string
	what    string            // in plain English, for the README
	setup   func(*faultWorld) // breaks a world in which an image-pull Secret is there and a run would patch it
	args    []string
	timeout time.Duration // --timeout; 0: 10 s
	within  time.Duration // in which the run must end; 0: 5 s
	code    int
	secret  string
	tries   int // of the ECR call or the patch until the run succeeded; 0: there was one
}

// faultWorld is a world with one fault.
type faultWorld struct {
	*world
	prepare func(*exec.Cmd) // makes the last changes to the command; may be nil
	process *os.Process     // to be read only after started is closed
	started chan struct{}
}

// signal sends SIGTERM to the run.
func (w *faultWorld) signal() {
	<-w.started
	w.process.Signal(syscall.SIGTERM)
}

// gated is h, closed until the run has started: only then is all of the world set up.
func (w *faultWorld) gated(h http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		<-w.started
		h.ServeHTTP(rw, r)
	})
}

// faultGroups is the matrix: the party that is at fault, and its faults.
var faultGroups = []struct {
	party  string
	faults []fault
}{
	{"AWS", slices.Concat(faultsOfAWSConnections, faultsOfAWSErrors, faultsOfAWSAnswers)},
	{"Kubernetes", slices.Concat(faultsOfKubernetesConnections, faultsOfKubernetesAnswers)},
	{"Local", faultsOfPod},
}

var faultsOfAWSConnections = []fault{
	{name: "aws-refused", what: "nothing listens at the ECR endpoint", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.setECR("https://" + w.closedPort().addr) }},
	{name: "aws-unknown-host", what: "the ECR endpoint's name does not exist", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.setECR("https://" + faultNoHost + ".amazonaws.com") }},
	{name: "aws-untrusted-ca", what: "the ECR endpoint's certificate is of an unknown CA", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.env["AWS_CA_BUNDLE"] = w.file("other-ca.pem", w.otherCA()) }},
	{name: "aws-wrong-host-name", what: "the ECR endpoint's certificate is for another host", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.setECR(w.startTLSAs(w.ecr, standin.CertOptions{Hosts: []string{"other.example"}}).URL)
		}},
	{name: "aws-expired-certificate", what: "the ECR endpoint's certificate has expired", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.setECR(w.startTLSAs(w.ecr, faultExpiredCertificate()).URL) }},
	{name: "aws-plain-http", what: "the ECR endpoint speaks plain HTTP on the https port", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.setECR(w.plainHTTP()) }},
	{name: "aws-proxy-refuses", what: "the proxy refuses to connect to ECR", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			proxy := standin.StartHTTP(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { rw.WriteHeader(http.StatusForbidden) }))
			w.t.Cleanup(proxy.Close)
			w.env["HTTPS_PROXY"] = proxy.URL
			w.setECR("https://ecr.example") // a name: loopback is never reached through a proxy
		}},
	{name: "aws-proxy-refused", what: "nothing listens at the proxy", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.env["HTTPS_PROXY"] = "http://" + w.closedPort().addr
			w.setECR("https://ecr.example")
		}},
	{name: "aws-no-handshake", what: "the ECR endpoint accepts the connection and is silent", code: 1, secret: "unchanged", timeout: time.Second,
		setup: func(w *faultWorld) { w.setECR("https://" + w.silentPort()) }},
	{name: "aws-never-answers", what: "ECR takes the request and never answers", code: 1, secret: "unchanged", timeout: time.Second,
		setup: func(w *faultWorld) { w.ecr.Intercept = faultAlways(faultHang) }},
	{name: "aws-one-byte-a-second", what: "ECR answers one byte a second", code: 1, secret: "unchanged", timeout: 3 * time.Second, within: 6 * time.Second,
		setup: func(w *faultWorld) { w.ecr.Intercept = faultAlways(faultDribble) }},
	{name: "aws-endless-body", what: "ECR's answer never ends", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.ecr.Intercept = faultAlways(faultEndless) }},
	{name: "aws-reset", what: "the connection to ECR is reset in the middle of the answer", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.ecr.Intercept = faultAlways(faultReset) }},
	{name: "aws-truncated", what: "ECR's answer ends early", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.ecr.Intercept = faultAlways(faultTruncate) }},
	{name: "aws-redirect", what: "ECR redirects to another host", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.ecr.Intercept = faultAlways(w.redirect(http.StatusFound)) }},
}

var faultsOfAWSErrors = []fault{
	{name: "aws-access-denied", what: "the identity may not get a token", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.ecr.Deny(faultKey) }},
	{name: "aws-expired-token", what: "the session token has expired", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.ecr.Expire(faultKey) }},
	{name: "aws-unknown-key", what: "AWS does not know the access key", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.env["AWS_ACCESS_KEY_ID"] = "AKIAUNKNOWN" }},
	{name: "aws-wrong-secret-key", what: "the secret key is not that of the access key", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.env["AWS_SECRET_ACCESS_KEY"] = strings.ToLower(awsSecret) }},
	{name: "aws-clock-one-try", what: "the node's clock is an hour slow, and `AWS_MAX_ATTEMPTS` is 1", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.ecr.Now = faultClockOff(time.Hour) }},
	{name: "aws-clock-slow", what: "the node's clock is an hour slow", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) { w.env["AWS_MAX_ATTEMPTS"] = "2"; w.ecr.Now = faultClockOff(time.Hour) }},
	{name: "aws-clock-fast", what: "the node's clock is an hour fast", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) { w.env["AWS_MAX_ATTEMPTS"] = "2"; w.ecr.Now = faultClockOff(-time.Hour) }},
	{name: "aws-clock-a-day-fast", what: "the node's clock is a day fast: the new token seems to have expired", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) { w.env["AWS_MAX_ATTEMPTS"] = "2"; w.ecr.Now = faultClockOff(-24 * time.Hour) }},
	{name: "aws-throttled-once", what: "ECR throttles the first call", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) {
			delete(w.env, "AWS_MAX_ATTEMPTS")
			w.ecr.Intercept = faultFirst(1, faultAWSError(http.StatusBadRequest, "ThrottlingException", "Rate exceeded"))
		}},
	{name: "aws-throttled", what: "ECR throttles every call", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.env["AWS_MAX_ATTEMPTS"] = "2"
			w.ecr.Intercept = faultAlways(faultAWSError(http.StatusBadRequest, "ThrottlingException", "Rate exceeded"))
		}},
	{name: "aws-500-twice", what: "ECR answers 500 twice", code: 0, secret: "patched", tries: 3, within: 8 * time.Second,
		setup: func(w *faultWorld) {
			delete(w.env, "AWS_MAX_ATTEMPTS")
			w.ecr.Intercept = faultFirst(2, faultAWSError(http.StatusInternalServerError, "ServerException", "internal"))
		}},
	{name: "aws-503", what: "ECR answers 503 for good", code: 1, secret: "unchanged", within: 8 * time.Second,
		setup: func(w *faultWorld) {
			delete(w.env, "AWS_MAX_ATTEMPTS")
			w.ecr.Intercept = faultAlways(faultStatus(http.StatusServiceUnavailable))
		}},
	{name: "aws-token-in-message", what: "ECR's error quotes the session token, on several lines", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.ecr.Intercept = faultAlways(faultAWSError(http.StatusBadRequest, "IncompleteSignatureException", "bad header "+awsSession+"\ntime=x level=INFO msg=\"secret patched\""))
		}},
	{name: "aws-one-region-fails", what: "of two regions, one is refused", code: 1, secret: "unchanged",
		args: []string{"--registry", ecrName, "--registry", account + ".dkr.ecr.us-east-1.amazonaws.com"},
		setup: func(w *faultWorld) { // the stand-in takes keys for its own region alone
			w.ecr.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.Header.Get("Authorization"), "/us-east-1/") {
					return false
				}
				standin.AWSError(rw, http.StatusBadRequest, "UnrecognizedClientException", "The security token included in the request is invalid.")
				return true
			}
		}},
	{name: "sts-refused", what: "IRSA: nothing listens at the STS endpoint", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.webIdentity(); w.env["AWS_ENDPOINT_URL_STS"] = "https://" + w.closedPort().addr }},
	{name: "sts-invalid-identity-token", what: "IRSA: the issuer is no IAM identity provider", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.webIdentity().Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) {
				standin.STSError(rw, http.StatusBadRequest, "InvalidIdentityToken", "No OpenIDConnect provider found in your account for https://oidc.example.com")
			})
		}},
	{name: "sts-web-identity-denied", what: "IRSA: the role's trust policy does not allow this ServiceAccount", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.webIdentity().RoleArn = "arn:aws:iam::123456789012:role/other" }},
	{name: "sts-token-expired", what: "IRSA: the projected token has expired", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.webIdentity().Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) {
				standin.STSError(rw, http.StatusBadRequest, "ExpiredTokenException", "Token expired: current date/time 1767323045 must be before the expiration date/time 1767319445")
			})
		}},
	{name: "sts-assume-role-denied", what: "the identity may not assume the role of `--assume-role-arn`", code: 1, secret: "unchanged",
		args: []string{"--assume-role-arn", "arn:aws:iam::210987654321:role/pull"},
		setup: func(w *faultWorld) {
			sts := &standin.STS{Region: region}
			sts.Deny(faultKey)
			w.env["AWS_ENDPOINT_URL_STS"] = w.startTLS(w.gated(sts)).URL
		}},
	{name: "pod-identity-no-association", what: "Pod Identity: no association exists", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.podIdentity().Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) {
				standin.PodIdentityError(rw, http.StatusNotFound, "ResourceNotFoundException", "No association found")
			})
		}},
	{name: "pod-identity-500", what: "Pod Identity: the agent fails", code: 1, secret: "unchanged", within: 10 * time.Second,
		setup: func(w *faultWorld) {
			w.podIdentity().Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) {
				standin.PodIdentityError(rw, http.StatusInternalServerError, "InternalServerException", "unable to reach EKS Auth")
			})
		}},
	{name: "pod-identity-refused", what: "Pod Identity: no agent on the node", code: 1, secret: "unchanged", within: 10 * time.Second,
		setup: func(w *faultWorld) {
			w.podIdentity()
			w.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = "http://" + w.closedPort().addr + "/v1/credentials"
		}},
	{name: "imds-silent", what: "instance role: the metadata service does not answer (hop limit 1)", code: 1, secret: "unchanged", within: 6 * time.Second,
		setup: func(w *faultWorld) { w.imds("").Intercept = faultAlways(faultHang) }},
	{name: "imds-refused", what: "instance role: nothing listens at the metadata service's address", code: 1, secret: "unchanged", within: 6 * time.Second,
		setup: func(w *faultWorld) {
			w.imds("")
			w.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = "http://" + w.closedPort().addr
		}},
	{name: "imds-no-role", what: "instance role: the instance has none", code: 1, secret: "unchanged", within: 6 * time.Second,
		setup: func(w *faultWorld) { w.imds("") }},
}

var faultsOfAWSAnswers = []fault{
	{name: "aws-truncated-json", what: "ECR's JSON ends in the middle", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.ecr.Intercept = faultAlways(faultBody(`{"authorizationData":[{"authorizationToken":"` + w.ecr.Token()[:20]))
		}},
	{name: "aws-html", what: "a portal answers in HTML with 200", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.ecr.Intercept = faultAlways(faultBody("<html>Please log in</html>")) }},
	{name: "aws-html-403", what: "a portal answers in HTML with 403", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.ecr.Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) {
				http.Error(rw, "<html>"+r.Header.Get("X-Amz-Security-Token")+"</html>", http.StatusForbidden)
			})
		}},
	{name: "aws-no-data", what: "ECR's `authorizationData` is empty", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.ecr.Intercept = faultAlways(faultBody(`{"authorizationData":[]}`)) }},
	{name: "aws-no-token", what: "ECR's answer has no token", code: 1, secret: "unchanged", setup: faultECRData("authorizationToken", nil)},
	{name: "aws-not-base64", what: "the token is not base64", code: 1, secret: "unchanged", setup: faultECRData("authorizationToken", "AWS:"+ecrPassword)},
	{name: "aws-no-colon", what: "the token has no colon", code: 1, secret: "unchanged", setup: faultECRData("authorizationToken", faultEncoded("AWS "+ecrPassword))},
	{name: "aws-empty-user", what: "the token has an empty user", code: 1, secret: "unchanged", setup: faultECRData("authorizationToken", faultEncoded(":"+ecrPassword))},
	{name: "aws-empty-password", what: "the token has an empty password", code: 1, secret: "unchanged", setup: faultECRData("authorizationToken", faultEncoded("AWS:"))},
	{name: "aws-binary-token", what: "the token holds control characters", code: 1, secret: "unchanged", setup: faultECRData("authorizationToken", faultEncoded("AWS:"+ecrPassword+"\n"))},
	{name: "aws-no-expiry", what: "ECR's answer has no `expiresAt`", code: 1, secret: "unchanged", setup: faultECRData("expiresAt", nil)},
	{name: "aws-no-endpoint", what: "ECR's answer has no `proxyEndpoint`, and there is no `--registry`", code: 1, secret: "unchanged", setup: faultECRData("proxyEndpoint", nil)},
	{name: "aws-bad-endpoint", what: "ECR's `proxyEndpoint` is no host", code: 1, secret: "unchanged", setup: faultECRData("proxyEndpoint", "https://evil/\"}")},
	{name: "aws-largest-token", what: "the token just fits: the Secret has 1 MiB with it", code: 0, secret: "patched", timeout: 30 * time.Second, within: 20 * time.Second,
		setup: func(w *faultWorld) { w.bigToken(faultLargestPassword) }},
	{name: "aws-token-one-byte-more", what: "the token has one byte more", code: 1, secret: "unchanged", timeout: 30 * time.Second, within: 20 * time.Second,
		setup: func(w *faultWorld) { w.bigToken(faultLargestPassword + 1) }},
	{name: "aws-1-mib-token", what: "the token has 1 MiB (the Secret holds it twice, decoded and not)", code: 1, secret: "unchanged", timeout: 30 * time.Second, within: 20 * time.Second,
		setup: func(w *faultWorld) { w.bigToken(1<<20*3/4 - len("AWS:")) }},
	{name: "aws-2-mib-token", what: "the token has 2 MiB", code: 1, secret: "unchanged", timeout: 30 * time.Second, within: 20 * time.Second,
		setup: func(w *faultWorld) { w.bigToken(2<<20*3/4 - len("AWS:")) }},
	{name: "aws-5-mib-token", what: "the token has 5 MiB, more than is read of an answer", code: 1, secret: "unchanged", timeout: 30 * time.Second, within: 20 * time.Second,
		setup: func(w *faultWorld) { w.bigToken(5<<20*3/4 - len("AWS:")) }},
}

var faultsOfKubernetesConnections = []fault{
	{name: "k8s-refused-then-up", what: "the API server is down, and comes back", code: 0, secret: "patched", tries: 2, within: 8 * time.Second,
		setup: func(w *faultWorld) {
			port := w.closedPort()
			w.setAPI("https://" + port.addr)
			w.ecr.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				up := make(chan struct{})
				timer := time.AfterFunc(600*time.Millisecond, func() { // the second try comes after 750 ms at the soonest
					defer close(up)
					port.serve(w.k8s)
				})
				w.t.Cleanup(func() {
					if !timer.Stop() {
						<-up
					}
				})
				return false
			}
		}},
	{name: "k8s-refused", what: "the API server is down for good", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		setup: func(w *faultWorld) { w.setAPI("https://" + w.closedPort().addr) }},
	{name: "k8s-unknown-host", what: "the API server's name does not exist", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		args: []string{"--api-server", "https://" + faultNoHost + ".example"}},
	{name: "k8s-wrong-ca", what: "`ca.crt` is of another cluster", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { overwrite(w.t, w.mount+"/ca.crt", w.otherCA()) }},
	{name: "k8s-wrong-host-name", what: "the API server's certificate is for another address", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.setAPI(w.startTLSAs(w.k8s, standin.CertOptions{Hosts: []string{"10.0.0.1"}}).URL)
		}},
	{name: "k8s-expired-certificate", what: "the API server's certificate has expired", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.setAPI(w.startTLSAs(w.k8s, faultExpiredCertificate()).URL) }},
	{name: "k8s-plain-http", what: "the API server's port speaks plain HTTP", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.setAPI(w.plainHTTP()) }},
	{name: "k8s-no-handshake", what: "the API server accepts the connection and is silent", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		setup: func(w *faultWorld) { w.setAPI("https://" + w.silentPort()) }},
	{name: "k8s-never-answers", what: "the API server takes the patch and never answers", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(faultHang) }},
	{name: "k8s-one-byte-a-second", what: "the API server answers one byte a second", code: 1, secret: "unchanged", timeout: 3 * time.Second, within: 6 * time.Second,
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(faultDribble) }},
	{name: "k8s-endless-body", what: "the API server's answer never ends", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(faultEndless) }},
	{name: "k8s-reset-once", what: "the connection is reset in the middle of the answer, once", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) { w.k8s.Intercept = faultFirst(1, faultReset) }},
	{name: "k8s-reset", what: "the connection is reset in the middle of every answer", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(faultReset) }},
	{name: "k8s-answer-lost-once", what: "the API server stores the patch, and its answer is lost", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) { w.loseAnswers(1) }},
	{name: "k8s-answer-lost", what: "the API server stores each patch, and each answer is lost", code: 1, secret: "patched", timeout: 2 * time.Second,
		setup: func(w *faultWorld) { w.loseAnswers(1000) }},
	{name: "k8s-truncated-once", what: "the answer ends early, once", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) { w.k8s.Intercept = faultFirst(1, faultTruncate) }},
	{name: "k8s-truncated", what: "every answer ends early", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(faultTruncate) }},
	{name: "k8s-redirect", what: "the API server redirects to another host (which gets no token)", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(w.redirect(http.StatusTemporaryRedirect)) }},
}

var faultsOfKubernetesAnswers = []fault{
	{name: "k8s-401-rotated", what: "401, and the kubelet has rotated the token in between", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) {
			w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				if n == 1 {
					w.k8s.SetTokens("rotated-" + saToken)
					w.writeMount("rotated-" + saToken)
				}
				return false
			}
		}},
	{name: "k8s-401", what: "401 for good", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.k8s.SetTokens("another") }},
	{name: "k8s-403", what: "403: the Role is missing", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.k8s.SetRules() }},
	{name: "k8s-404-secret", what: "404: the Secret is missing", code: 0, secret: "created",
		setup: func(w *faultWorld) { w.k8s.Delete(ns, name) }},
	{name: "k8s-404-secret-no-create", what: "404: the Secret is missing, and the Role does not allow to create it", code: 1, secret: "still missing",
		setup: func(w *faultWorld) {
			w.k8s.Delete(ns, name)
			w.k8s.SetRules(standin.Rule{Namespace: ns, Verbs: []string{"patch"}, ResourceNames: []string{name}})
		}},
	{name: "k8s-404-namespace", what: "404: the namespace is missing", code: 1, secret: "unchanged", args: []string{"--namespace", "nowhere"},
		setup: func(w *faultWorld) {
			w.k8s.SetRules(standin.Rule{Namespace: "nowhere", Verbs: []string{"patch", "create"}})
		}},
	{name: "k8s-404-path", what: "404: the base URL is not the API server's", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(http.NotFound) }},
	{name: "k8s-409-created-meanwhile", what: "409: somebody else creates the missing Secret first", code: 0, secret: "patched",
		setup: func(w *faultWorld) {
			w.k8s.Delete(ns, name)
			w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				if n == 2 { // between the merge patch and the apply, which then conflicts
					w.putOld()
				}
				return false
			}
		}},
	{name: "k8s-409", what: "409: the patch meets a conflict", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultAlways(faultRefusal(http.StatusConflict, "Conflict", `Operation cannot be fulfilled on secrets "ecr-credentials": the object has been modified; please apply your changes to the latest version and try again`))
		}},
	{name: "k8s-415", what: "415: the server does not know merge patches", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				r.Header.Set("Content-Type", "application/json") // as a proxy might
				return false
			}
		}},
	{name: "k8s-422-type", what: "422: the Secret is of another type", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.put("Opaque", map[string]any{"a": "Yg=="}) }},
	{name: "k8s-422-immutable", what: "422: the Secret is immutable", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Put(ns, name, map[string]any{"metadata": map[string]any{}, "type": dockerConfigType, "immutable": true, "data": map[string]any{".dockerconfigjson": oldConfig}})
		}},
	{name: "k8s-422-too-long", what: "422: the token and the Secret's other data exceed 1 MiB", code: 1, secret: "unchanged", timeout: 30 * time.Second, within: 20 * time.Second,
		setup: func(w *faultWorld) { w.bigToken(faultLargestPassword); w.putOld() }},
	{name: "k8s-422-leaking", what: "422: the API server's message quotes the whole Secret", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) {
				patch, _ := io.ReadAll(r.Body)
				text := fmt.Sprintf("Invalid value: %q: illegal base64 data at input byte 4", patch)
				rw.Header().Set("Content-Type", "application/json")
				rw.WriteHeader(http.StatusUnprocessableEntity)
				json.NewEncoder(rw).Encode(map[string]any{
					"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422,
					"message": ` "" is invalid: patch: ` + text,
					"details": map[string]any{"causes": []any{map[string]any{"reason": "FieldValueInvalid", "message": text, "field": "patch"}}},
				})
			})
		}},
	{name: "k8s-token-in-message", what: "400: the message quotes the bearer token, on several lines", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) {
				standin.StatusError(rw, http.StatusBadRequest, "BadRequest", "bad header "+r.Header.Get("Authorization")+"\ntime=x level=INFO msg=\"secret patched\"")
			})
		}},
	{name: "k8s-data-in-message", what: "400: the message quotes other data of the Secret", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { // data that this run never saw
			w.k8s.Intercept = faultAlways(faultRefusal(http.StatusBadRequest, "BadRequest", `unable to decode {"data":{"other":"`+faultEncoded(issuedSecret)+`"}}`))
		}},
	{name: "k8s-long-message", what: "400: the message has 100 kB", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultAlways(faultRefusal(http.StatusBadRequest, "BadRequest", strings.Repeat("a long story ", 8000)))
		}},
	{name: "k8s-429-seconds", what: "429 with `Retry-After: 1`", code: 0, secret: "patched", tries: 2, within: 6 * time.Second,
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultFirst(1, faultRetryAfter(func() string { return "1" }))
		}},
	{name: "k8s-429-date", what: "429 with a `Retry-After` date two seconds ahead", code: 0, secret: "patched", tries: 2, within: 8 * time.Second,
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultFirst(1, faultRetryAfter(func() string { return time.Now().Add(2 * time.Second).UTC().Format(http.TimeFormat) }))
		}},
	{name: "k8s-429-hour", what: "429 with a `Retry-After` past the deadline", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultFirst(1, faultRetryAfter(func() string { return "3600" }))
		}},
	{name: "k8s-500-once", what: "500, once", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultFirst(1, faultRefusal(http.StatusInternalServerError, "InternalError", "etcdserver: leader changed"))
		}},
	{name: "k8s-500", what: "500 for good", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultAlways(faultRefusal(http.StatusInternalServerError, "InternalError", "etcdserver: request timed out"))
		}},
	{name: "k8s-503-once", what: "503 without a body, once", code: 0, secret: "patched", tries: 2,
		setup: func(w *faultWorld) { w.k8s.Intercept = faultFirst(1, faultStatus(http.StatusServiceUnavailable)) }},
	{name: "k8s-503", what: "503 without a body for good", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(faultStatus(http.StatusServiceUnavailable)) }},
	{name: "k8s-html-502", what: "a load balancer answers 502 in HTML", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) {
				http.Error(rw, "<html>502 Bad Gateway</html>", http.StatusBadGateway)
			})
		}},
	{name: "k8s-html-200", what: "a portal answers 200 in HTML", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(faultBody("<html>Please log in</html>")) }},
	{name: "k8s-empty-200", what: "200 without a body", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.k8s.Intercept = faultAlways(faultStatus(http.StatusOK)) }},
}

var faultsOfPod = []fault{
	{name: "token-missing", what: "no service-account token", code: 2, secret: "unchanged", setup: faultMountWithout("token")},
	{name: "token-empty", what: "the token is empty", code: 2, secret: "unchanged", setup: faultMountWith("token", " \n")},
	{name: "token-unreadable", what: "the token is unreadable", code: 2, secret: "unchanged", setup: faultMountWithFolder("token")},
	{name: "token-garbage", what: "the token is binary garbage", code: 2, secret: "unchanged", setup: faultMountWith("token", "\x00\x01"+saToken+"\n\xff")},
	{name: "token-vanishes", what: "the token vanishes after the start", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.ecr.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				remove(w.t, w.mount+"/token")
				return false
			}
		}},
	{name: "token-emptied", what: "the token is emptied after the start", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.ecr.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				overwrite(w.t, w.mount+"/token", "")
				return false
			}
		}},
	{name: "ca-missing", what: "no `ca.crt`", code: 2, secret: "unchanged", setup: faultMountWithout("ca.crt")},
	{name: "ca-empty", what: "`ca.crt` is empty", code: 2, secret: "unchanged", setup: faultMountWith("ca.crt", "\n")},
	{name: "ca-unreadable", what: "`ca.crt` is unreadable", code: 2, secret: "unchanged", setup: faultMountWithFolder("ca.crt")},
	{name: "ca-garbage", what: "`ca.crt` holds no certificate", code: 2, secret: "unchanged",
		setup: faultMountWith("ca.crt", "-----BEGIN CERTIFICATE-----\nZ2FyYmFnZQ==\n-----END CERTIFICATE-----\n")},
	{name: "namespace-missing", what: "no `namespace` file, and no `--namespace`", code: 2, secret: "unchanged", setup: faultMountWithout("namespace")},
	{name: "namespace-empty", what: "the `namespace` file is empty", code: 2, secret: "unchanged", setup: faultMountWith("namespace", "")},
	{name: "namespace-unreadable", what: "the `namespace` file is unreadable", code: 2, secret: "unchanged", setup: faultMountWithFolder("namespace")},
	{name: "namespace-garbage", what: "the `namespace` file holds no name", code: 2, secret: "unchanged", setup: faultMountWith("namespace", "../kube system\n")},
	{name: "mount-missing", what: "no service-account mount", code: 2, secret: "unchanged", setup: faultMountWithout("")},
	{name: "web-identity-token-missing", what: "IRSA: no token file", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.webIdentity(); remove(w.t, w.env["AWS_WEB_IDENTITY_TOKEN_FILE"]) }},
	{name: "web-identity-token-empty", what: "IRSA: the token file is empty", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.webIdentity(); overwrite(w.t, w.env["AWS_WEB_IDENTITY_TOKEN_FILE"], "\n") }},
	{name: "web-identity-token-unreadable", what: "IRSA: the token file is unreadable", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.webIdentity(); w.folder(w.env["AWS_WEB_IDENTITY_TOKEN_FILE"]) }},
	{name: "aws-ca-bundle-missing", what: "`AWS_CA_BUNDLE` names no file", code: 2, secret: "unchanged",
		setup: func(w *faultWorld) { remove(w.t, w.env["AWS_CA_BUNDLE"]) }},
	{name: "environment-unset", what: "the environment is empty", code: 2, secret: "unchanged",
		setup: func(w *faultWorld) { clear(w.env) }},
	{name: "environment-no-credentials", what: "no AWS credentials, and the instance's role switched off", code: 2, secret: "unchanged",
		setup: func(w *faultWorld) { w.clearSource(); w.env["AWS_EC2_METADATA_DISABLED"] = "true" }},
	{name: "ipv6", what: "the API server has an IPv6 address (no fault)", code: 0, secret: "patched",
		setup: func(w *faultWorld) {
			listener, err := net.Listen("tcp6", "[::1]:0")
			if err != nil {
				w.t.Skip("no IPv6 loopback:", err)
			}
			w.setAPI(w.serveTLS(listener, w.k8s).URL)
		}},
	{name: "ipv6-refused", what: "nothing listens at the API server's IPv6 address", code: 1, secret: "unchanged", timeout: 2 * time.Second,
		setup: func(w *faultWorld) { // port 1 has no server
			w.env["KUBERNETES_SERVICE_HOST"], w.env["KUBERNETES_SERVICE_PORT"] = "::1", "1"
		}},
	{name: "sigterm-before", what: "SIGTERM before the ECR call", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.ecr.Intercept = faultAlways(faultHang)
			w.signalAtNextTokenRead()
		}},
	{name: "sigterm-during-ecr", what: "SIGTERM during the ECR call", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.ecr.Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) { w.signal(); faultHang(rw, r) })
		}},
	{name: "sigterm-between", what: "SIGTERM between the two calls", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultAlways(faultHang)
			w.ecr.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
				w.signalAtNextTokenRead()
				return false
			}
		}},
	{name: "sigterm-during-patch", what: "SIGTERM during the patch", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) { w.signal(); faultHang(rw, r) })
		}},
	{name: "sigterm-while-waiting", what: "SIGTERM while the run waits to try again", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) {
			w.k8s.Intercept = faultAlways(func(rw http.ResponseWriter, r *http.Request) {
				faultRetryAfter(func() string { return "5" })(rw, r)
				time.AfterFunc(500*time.Millisecond, w.signal)
			})
		}},
	{name: "stderr-closed", what: "stderr is closed", code: 0, secret: "patched",
		setup: func(w *faultWorld) { w.closeStderr() }},
	{name: "stderr-closed-failing", what: "stderr is closed, and the patch is refused", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.closeStderr(); w.k8s.SetRules() }},
	{name: "stderr-no-reader", what: "stderr is a pipe that nobody holds any more", code: 0, secret: "patched",
		setup: func(w *faultWorld) { w.pipeStderr(false) }},
	{name: "stderr-full", what: "stderr is a full pipe", code: 0, secret: "patched",
		setup: func(w *faultWorld) { w.pipeStderr(true) }},
	{name: "stderr-full-retry", what: "stderr is a full pipe, and the first patch gets 500", code: 0, secret: "patched", within: 8 * time.Second,
		setup: func(w *faultWorld) {
			w.pipeStderr(true)
			w.k8s.Intercept = faultFirst(1, faultRefusal(http.StatusInternalServerError, "InternalError", "etcdserver: leader changed"))
		}},
	{name: "stderr-full-failing", what: "stderr is a full pipe, and the patch is refused", code: 1, secret: "unchanged",
		setup: func(w *faultWorld) { w.pipeStderr(true); w.k8s.SetRules() }},
}

func TestFaults(t *testing.T) {
	const goldenFile = "testdata/faults/lines.golden"
	golden := map[string]string{}
	text, err := os.ReadFile(goldenFile)
	if err != nil && !*faultUpdate {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		name, last, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		golden[name] = last
	}

	// Most runs wait, so more are under way than there are processors; t.Parallel would not allow that.
	var mu sync.Mutex
	got := map[string]string{}
	var running sync.WaitGroup
	slots := make(chan struct{}, 12)
	for _, group := range faultGroups {
		for _, f := range group.faults {
			slots <- struct{}{}
			running.Go(func() {
				defer func() { <-slots }()
				t.Run(f.name, func(t *testing.T) {
					last := f.test(t, group.party)
					if !*faultUpdate && last != golden[f.name] {
						t.Errorf("last line on stderr\n got %s\nwant %s", last, golden[f.name])
					}
					mu.Lock()
					defer mu.Unlock()
					got[f.name] = last
				})
			})
		}
	}
	running.Wait()

	var lines, table strings.Builder
	total := 0
	for _, group := range faultGroups {
		total += len(group.faults)
		fmt.Fprintf(&table, "\n%s, %d cases:\n\n| fault | exit code | last line | Secret |\n|---|---|---|---|\n", group.party, len(group.faults))
		for _, f := range group.faults {
			last, ran := got[f.name]
			if !ran { // left out by -run, or skipped
				last = golden[f.name]
			}
			fmt.Fprintf(&lines, "%s: %s\n", f.name, last)
			fmt.Fprintf(&table, "| %s | %d | %s | %s |\n", f.what, f.code, f.summary(last), f.secret)
		}
	}
	head := fmt.Sprintf("`go test -run TestFaults .` runs the compiled program in each of these %d cases. The whole last lines, hints included, stand in [lines.golden](%s).\n", total, goldenFile)
	faultCheckGenerated(t, goldenFile, string(text), lines.String())

	const begin, end = "<!-- faults:begin -->\n", "<!-- faults:end -->\n"
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	before, rest, found := strings.Cut(string(readme), begin)
	_, after, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("README.md has no lines %s and %s", begin, end)
	}
	faultCheckGenerated(t, "README.md", string(readme), before+begin+head+table.String()+end+after)
}

// test runs the program against the fault, checks all but the last line on stderr, and returns that.
func (f fault) test(t *testing.T, party string) (last string) {
	w := &faultWorld{world: newWorld(t), started: make(chan struct{})}
	w.setECR(w.startTLS(w.gated(w.ecr)).URL)
	w.setAPI(w.startTLS(w.gated(w.k8s)).URL)
	w.env["AWS_MAX_ATTEMPTS"] = "1"
	w.putOld()
	if f.setup != nil {
		f.setup(w)
	}
	timeout, within := f.timeout, f.within
	if timeout == 0 {
		timeout = 10 * time.Second
	}
	if within == 0 {
		within = 5 * time.Second
	}
	before := w.k8s.Secret(ns, name)

	cmd := w.command(append([]string{"--secret", name, "--timeout", timeout.String()}, f.args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if w.prepare != nil {
		w.prepare(cmd)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.process = cmd.Process
	close(w.started)
	kill := time.AfterFunc(within+3*time.Second, func() { w.process.Kill() })
	defer kill.Stop()
	if err := cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	o := outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String(), time.Since(start)}

	if o.code != f.code {
		t.Errorf("exit code %d, want %d", o.code, f.code)
	}
	if o.took > within {
		t.Errorf("it took %v, more than %v", o.took, within)
	}
	if o.stdout != "" {
		t.Errorf("stdout %q", o.stdout)
	}
	checkNoSecrets(t, o.stderr)
	tries := strings.Count(o.stderr, `msg="trying the API server again"`) + 1
	if party == "AWS" {
		tries = len(w.ecr.Requests())
	}
	if f.code == 0 && stderr.Len() > 0 && tries != max(1, f.tries) {
		t.Errorf("%d tries, want %d", tries, max(1, f.tries))
	}
	for line := range strings.Lines(o.stderr) {
		if !faultLine.MatchString(line) {
			t.Errorf("this line is not the program's: %q", line)
		}
		if len(line) > 2048 { // what a container's termination message holds
			t.Errorf("a line of %d bytes: %s", len(line), line)
		}
	}
	if got := w.state(before); got != f.secret {
		t.Errorf("the Secret is %s, want %s", got, f.secret)
	}
	if t.Failed() {
		t.Logf("stderr:\n%s", o.stderr)
	}
	return w.normal(o.last())
}

// faultLine matches a whole line of the program.
var faultLine = regexp.MustCompile(`^time=\S+ level=(INFO|WARN|ERROR) msg=("([^"\\]|\\.)*"|\S+)( [a-z]+=("([^"\\]|\\.)*"|\S+))*\n$`)

// state says what became of the Secret.
func (w *faultWorld) state(before map[string]any) string {
	after := w.k8s.Secret(ns, name)
	switch {
	case before == nil && after == nil:
		return "still missing"
	case reflect.DeepEqual(before, after):
		return "unchanged"
	case after == nil:
		return "deleted"
	}
	s := w.secret()
	config := fmt.Sprintf(`{"auths":{%q:{"username":"AWS","password":%q,"auth":%q}}}`, ecrName, w.ecr.Password, w.ecr.Token())
	_, err := time.Parse(time.RFC3339, s.Metadata.Annotations["ecr-refresher/expires-at"])
	switch {
	case string(s.Data[".dockerconfigjson"]) != config || s.Type != dockerConfigType || err != nil:
		return "changed, but not to the new token"
	case s.Metadata.Labels["team"] == "web" && s.Metadata.Annotations["note"] == "keep me":
		return "patched"
	case before == nil && s.Metadata.Labels["app.kubernetes.io/managed-by"] == "ecr-refresher":
		return "created"
	}
	return "patched, but without what others wrote into it"
}

// faultVariable lists what differs from run to run in a line on stderr, and what stands for it.
var faultVariable = []struct {
	pattern *regexp.Regexp
	stable  string
}{
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "127.0.0.1:PORT"},
	{regexp.MustCompile(`\[::1\]:\d+`), "[::1]:PORT"},
	{regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`), "ID"},         // of an AWS request
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)`), "TIME"}, // RFC 3339
	{regexp.MustCompile(`\d{8}T\d{6}Z`), "TIME"},                                    // as in a signature
	{regexp.MustCompile(`took=[0-9a-z.]+`), "took=DURATION"},
	{regexp.MustCompile(`the next try, in \w+,`), "the next try, in DURATION,"},
}

// normal returns line with DIR for the world's folder, UNKNOWN for faultNoHost, and the variables replaced.
func (w *faultWorld) normal(line string) string {
	line = strings.NewReplacer(w.dir, "DIR", faultNoHost, "UNKNOWN").Replace(line)
	for _, v := range faultVariable {
		line = v.pattern.ReplaceAllString(line, v.stable)
	}
	if line == "" {
		return "(nothing)"
	}
	return line
}

// summary is the third column of the README's table: the message of the last line, without what all of them begin with,
// and cut after a hundred characters or so.
func (f fault) summary(last string) string {
	m := regexp.MustCompile(`msg=("(?:[^"\\]|\\.)*"|\S+)`).FindStringSubmatch(last)
	if m == nil {
		return "-"
	}
	message, err := strconv.Unquote(m[1])
	if err != nil {
		message = m[1]
	}
	for _, prefix := range []string{
		"getting an ECR token in eu-central-1: ",
		"getting AWS credentials from web identity (IRSA) for arn:aws:iam::123456789012:role/ecr-refresher: ",
		"getting AWS credentials from container (EKS Pod Identity, ECS) at http://127.0.0.1:PORT/v1/credentials: ",
		"getting AWS credentials from instance metadata: ",
		"patching secret shop/ecr-credentials: ",
		"invalid service-account mount (--service-account-dir): ",
	} {
		message = strings.TrimPrefix(message, prefix)
	}
	if i := strings.IndexFunc(message[min(len(message), 100):], func(r rune) bool { return r == ' ' }); i >= 0 {
		message = message[:100+i] + " ..."
	}
	message = "`" + strings.NewReplacer("`", "'", "|", `\|`).Replace(message) + "`"
	if f.tries > 1 {
		message += fmt.Sprintf(", at try %d", f.tries)
	}
	return message
}

// faultCheckGenerated compares a generated text with that of the file, or writes it there.
func faultCheckGenerated(t *testing.T, file, is, want string) {
	t.Helper()
	if is == want {
		return
	}
	if !*faultUpdate {
		t.Errorf("%s is stale: go test -run TestFaults . -update", file)
	} else if err := os.WriteFile(file, []byte(want), 0o644); err != nil {
		t.Error(err)
	}
}

// faultNoHost is a label of 64 letters. The resolver answers NXDOMAIN to it at once, without a DNS server, which the machine may
// lack.
var faultNoHost = strings.Repeat("x", 64)

// faultKey is the access key of every world.
var faultKey = standin.Key{ID: "AKIAIOSFODNN7EXAMPLE", Secret: awsSecret, SessionToken: awsSession}

func (w *faultWorld) setECR(address string) { w.env["AWS_ENDPOINT_URL_ECR"] = address }

// otherCA returns the certificate of a CA that issued none of the world's.
func (w *faultWorld) otherCA() string {
	w.t.Helper()
	ca, err := standin.NewCA()
	if err != nil {
		w.t.Fatal(err)
	}
	return string(ca.PEM())
}

func faultExpiredCertificate() standin.CertOptions {
	now := time.Now()
	return standin.CertOptions{Hosts: []string{"127.0.0.1"}, NotBefore: now.Add(-48 * time.Hour), NotAfter: now.Add(-24 * time.Hour)}
}

// faultClockOff is the clock of a service that is ahead of the node's by d.
func faultClockOff(d time.Duration) func() time.Time {
	return func() time.Time { return time.Now().Add(d) }
}

// faultPort is a port of loopback that belongs to the test, but refuses connections until it serves.
type faultPort struct {
	w    *faultWorld
	fd   int
	addr string
}

func (w *faultWorld) closedPort() *faultPort {
	w.t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	syscall.CloseOnExec(fd)
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		w.t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { syscall.Close(fd) })
	return &faultPort{w, fd, fmt.Sprintf("127.0.0.1:%d", sa.(*syscall.SockaddrInet4).Port)}
}

// serve opens the port.
func (p *faultPort) serve(h http.Handler) {
	if err := syscall.Listen(p.fd, 16); err != nil {
		p.w.t.Error(err)
		return
	}
	fd, err := syscall.Dup(p.fd)
	if err != nil {
		p.w.t.Error(err)
		return
	}
	f := os.NewFile(uintptr(fd), p.addr)
	defer f.Close()
	listener, err := net.FileListener(f)
	if err != nil {
		p.w.t.Error(err)
		return
	}
	p.w.serveTLS(listener, h)
}

// silentPort returns a port on which the kernel takes connections that nobody reads.
func (w *faultWorld) silentPort() string {
	w.t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { listener.Close() })
	return listener.Addr().String()
}

// serveTLS serves h on listener with a certificate of the world's CA.
func (w *faultWorld) serveTLS(listener net.Listener, h http.Handler) *httptest.Server {
	cert, err := w.ca.Certificate(standin.CertOptions{Hosts: []string{"127.0.0.1", "::1"}})
	if err != nil {
		panic(err)
	}
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: h}, TLS: &tls.Config{Certificates: []tls.Certificate{cert}}}
	server.StartTLS()
	w.t.Cleanup(server.Close)
	return server
}

// plainHTTP returns the https URL of a server without TLS, which must not be sent a request.
func (w *faultWorld) plainHTTP() string {
	server := standin.StartHTTP(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.t.Errorf("a request in clear: %s %s", r.Method, r.URL)
	}))
	w.t.Cleanup(server.Close)
	return strings.Replace(server.URL, "http://", "https://", 1)
}

// redirect answers with a redirect to a host that must not be asked. A client that did follow would follow 302 always, and 307
// only where it can repeat the body, which the AWS SDK's requests do not allow.
func (w *faultWorld) redirect(code int) http.HandlerFunc {
	other := w.startTLS(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.t.Errorf("the redirect was followed, with Authorization %q", r.Header.Get("Authorization"))
	}))
	return func(rw http.ResponseWriter, r *http.Request) { http.Redirect(rw, r, other.URL+r.URL.Path, code) }
}

// webIdentity makes IRSA the world's source of credentials.
func (w *faultWorld) webIdentity() *standin.STS {
	w.clearSource()
	sts := &standin.STS{Region: region, RoleArn: "arn:aws:iam::123456789012:role/ecr-refresher", WebIdentityToken: jwt,
		Issue: standin.Key{ID: "ASIAISSUED", Secret: issuedSecret, SessionToken: issuedToken}}
	w.env["AWS_ENDPOINT_URL_STS"] = w.startTLS(w.gated(sts)).URL
	w.env["AWS_ROLE_ARN"] = sts.RoleArn
	w.env["AWS_WEB_IDENTITY_TOKEN_FILE"] = w.file("web-identity-token", jwt)
	return sts
}

// podIdentity makes EKS Pod Identity the world's source of credentials.
func (w *faultWorld) podIdentity() *standin.PodIdentity {
	w.clearSource()
	agent := &standin.PodIdentity{Token: jwt, Issue: standin.Key{ID: "ASIAISSUED", Secret: issuedSecret, SessionToken: issuedToken}}
	server := standin.StartHTTP(w.gated(agent))
	w.t.Cleanup(server.Close)
	w.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = server.URL + "/v1/credentials"
	w.env["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = w.file("pod-identity-token", jwt)
	return agent
}

// imds makes the instance's role the world's source of credentials.
func (w *faultWorld) imds(role string) *standin.IMDS {
	w.clearSource()
	imds := &standin.IMDS{Role: role, Issue: standin.Key{ID: "ASIAISSUED", Secret: issuedSecret, SessionToken: issuedToken}}
	server := standin.StartHTTP(w.gated(imds))
	w.t.Cleanup(server.Close)
	w.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = server.URL
	return imds
}

// faultAlways answers every request.
func faultAlways(answer http.HandlerFunc) standin.Intercept {
	return func(n int, rw http.ResponseWriter, r *http.Request) bool {
		answer(rw, r)
		return true
	}
}

// faultFirst answers the first requests.
func faultFirst(requests int, answer http.HandlerFunc) standin.Intercept {
	return func(n int, rw http.ResponseWriter, r *http.Request) bool {
		if n <= requests {
			answer(rw, r)
		}
		return n <= requests
	}
}

// loseAnswers has the API server do what the first requests ask for, and drops its answers to them.
func (w *faultWorld) loseAnswers(requests int) {
	lost := 0
	w.k8s.Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
		if _, nested := rw.(*httptest.ResponseRecorder); nested || lost == requests {
			return false
		}
		lost++
		w.k8s.ServeHTTP(httptest.NewRecorder(), r)
		faultReset(rw, r)
		return true
	}
}

// faultHang answers nothing until the client goes away.
func faultHang(rw http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

func faultDribble(rw http.ResponseWriter, r *http.Request) {
	for r.Context().Err() == nil {
		io.WriteString(rw, " ")
		rw.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
		case <-time.After(time.Second):
		}
	}
}

func faultEndless(rw http.ResponseWriter, r *http.Request) {
	chunk := bytes.Repeat([]byte(" "), 64<<10)
	for r.Context().Err() == nil {
		if _, err := rw.Write(chunk); err != nil {
			return
		}
	}
}

// faultReset sends the beginning of an answer and then a TCP reset.
func faultReset(rw http.ResponseWriter, r *http.Request) {
	conn, _, err := rw.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
	tcp := conn.(*tls.Conn).NetConn().(*net.TCPConn)
	tcp.SetLinger(0)
	tcp.Close()
}

// faultTruncate sends less than it announces.
func faultTruncate(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Content-Length", "1000")
	io.WriteString(rw, `{"kind":"PartialObjectMetadata","metadata":{"name":"`)
}

func faultBody(text string) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, text) }
}

func faultStatus(code int) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) { rw.WriteHeader(code) }
}

func faultAWSError(code int, name, message string) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) { standin.AWSError(rw, code, name, message) }
}

// faultRefusal answers with a metav1.Status.
func faultRefusal(code int, reason, message string) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) { standin.StatusError(rw, code, reason, message) }
}

// faultRetryAfter answers as an API server does that sheds load.
func faultRetryAfter(value func() string) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Retry-After", value())
		standin.StatusError(rw, http.StatusTooManyRequests, "TooManyRequests", "too many requests, please try again later")
	}
}

func faultEncoded(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// faultECRData has ECR answer with one field changed, or left out when value is nil.
func faultECRData(field string, value any) func(*faultWorld) {
	return func(w *faultWorld) {
		data := map[string]any{"authorizationToken": w.ecr.Token(), "expiresAt": time.Now().Add(time.Hour).Unix(), "proxyEndpoint": "https://" + ecrName}
		if data[field] = value; value == nil {
			delete(data, field)
		}
		answer, err := json.Marshal(map[string]any{"authorizationData": []any{data}})
		if err != nil {
			w.t.Fatal(err)
		}
		w.ecr.Intercept = faultAlways(faultBody(string(answer)))
	}
}

// largestPassword is the length of the longest password that fits: the docker config, with the password p and
// base64("AWS:" + p), has exactly 1 MiB then or so many bytes less that one more would be too many.
var faultLargestPassword = func() int {
	frame := len(fmt.Sprintf(`{"auths":{%q:{"username":"AWS","password":"","auth":""}}}`, ecrName))
	n := 0
	for frame+n+1+base64.StdEncoding.EncodedLen(len("AWS:")+n+1) <= 1<<20 {
		n++
	}
	return n
}()

// faultBig lets one big token through at a time: with the race detector, the stand-ins work on one for seconds.
var faultBig sync.Mutex

// bigToken has ECR hand out a password of n bytes, in a Secret that holds nothing else.
func (w *faultWorld) bigToken(n int) {
	faultBig.Lock()
	w.t.Cleanup(faultBig.Unlock)
	w.ecr.Password = strings.Repeat(ecrPassword, n/len(ecrPassword)+1)[:n]
	w.put(dockerConfigType, map[string]any{".dockerconfigjson": oldConfig})
}

func faultMountWithout(file string) func(*faultWorld) {
	return func(w *faultWorld) { remove(w.t, filepath.Join(w.mount, file)) }
}

func faultMountWith(file, content string) func(*faultWorld) {
	return func(w *faultWorld) { overwrite(w.t, filepath.Join(w.mount, file), content) }
}

func faultMountWithFolder(file string) func(*faultWorld) {
	return func(w *faultWorld) { w.folder(filepath.Join(w.mount, file)) }
}

// folder puts a folder in the place of a file: the one unreadable file that root cannot read either.
func (w *faultWorld) folder(path string) {
	w.t.Helper()
	remove(w.t, path)
	if err := os.Mkdir(path, 0o700); err != nil {
		w.t.Fatal(err)
	}
}

// signalAtNextTokenRead puts a FIFO in the place of the service-account token: whoever opens it gets SIGTERM, and then the
// token.
func (w *faultWorld) signalAtNextTokenRead() {
	path := filepath.Join(w.mount, "token")
	remove(w.t, path)
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		w.t.Error(err)
		return
	}
	go func() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0) // returns when the run has opened it too
		if err != nil {
			return
		}
		defer f.Close()
		w.signal()
		io.WriteString(f, saToken)
	}()
}

// closeStderr starts the program without file descriptor 2.
func (w *faultWorld) closeStderr() {
	w.prepare = func(cmd *exec.Cmd) {
		cmd.Args = append([]string{"sh", "-c", `exec "$0" "$@" 2>&-`, cmd.Path}, cmd.Args[1:]...)
		cmd.Path = "/bin/sh"
	}
}

// pipeStderr makes a pipe of stderr that nobody reads: full, or with its other end closed.
func (w *faultWorld) pipeStderr(full bool) {
	w.t.Helper()
	r, stderr, err := os.Pipe()
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { r.Close(); stderr.Close() })
	if full {
		stderr.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		if n, err := stderr.Write(make([]byte, 4<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
			w.t.Fatalf("the pipe took %d bytes: %v", n, err)
		}
	} else {
		r.Close()
	}
	w.prepare = func(cmd *exec.Cmd) { cmd.Stderr = stderr }
}
