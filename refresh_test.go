package main

import (
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/ecr/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"

	"ecr-refresher/testdata/standin"
)

const (
	webRole   = "arn:aws:iam::123456789012:role/refresher"
	otherRole = "arn:aws:iam::210987654321:role/ecr-pull"
)

var (
	accessKey = standin.Key{ID: "AKIAIOSFODNN7EXAMPLE", Secret: awsSecret, SessionToken: awsSession}
	issued    = standin.Key{ID: "ASIAISSUED", Secret: issuedSecret, SessionToken: issuedToken}
	// hop is what a first STS call issues when a second one is to follow: ECR does not know it.
	hop = standin.Key{ID: "ASIAHOP", Secret: issuedSecret, SessionToken: issuedToken}
)

// sts adds an STS, where the access keys and hop may assume otherRole.
func (w *world) sts() *standin.STS {
	w.t.Helper()
	s := &standin.STS{Region: region, RoleArn: webRole, WebIdentityToken: jwt, Issue: issued, AssumeRoleArn: otherRole, IssueAssumed: issued}
	s.Allow(accessKey)
	s.Allow(hop)
	w.env["AWS_ENDPOINT_URL_STS"] = w.startTLS(s).URL
	return s
}

// irsa replaces the access keys by a web identity, as the EKS webhook configures it.
func (w *world) irsa() *standin.STS {
	w.t.Helper()
	w.clearSource()
	w.env["AWS_ROLE_ARN"] = webRole
	w.env["AWS_WEB_IDENTITY_TOKEN_FILE"] = w.file("web-identity-token", jwt+"\n")
	return w.sts()
}

// podIdentity replaces the access keys by an agent, as EKS Pod Identity configures it.
func (w *world) podIdentity() *standin.PodIdentity {
	w.t.Helper()
	w.clearSource()
	p := &standin.PodIdentity{Token: jwt, Issue: issued}
	w.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = w.startHTTP(p) + "/v1/credentials"
	w.env["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = w.file("pod-identity-token", jwt+"\n")
	return p
}

// imds replaces the access keys by an instance's role.
func (w *world) imds() *standin.IMDS {
	w.t.Helper()
	w.clearSource()
	i := &standin.IMDS{Role: "node-role", Issue: issued}
	w.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = w.startHTTP(i)
	return i
}

func (w *world) startHTTP(h http.Handler) string {
	w.t.Helper()
	server := standin.StartHTTP(h)
	w.t.Cleanup(server.Close)
	return server.URL
}

// silent returns the address of a server that takes connections and never answers, which is what a metadata service looks
// like whose answers are one hop short.
func (w *world) silent() string {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	done := make(chan bool)
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	w.t.Cleanup(func() {
		l.Close()
		<-done
	})
	return l.Addr().String()
}

// closed returns an address on which nothing listens.
func (w *world) closed() string {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// proxy is an HTTP proxy that knows CONNECT alone. It connects a host name to the server that stands in for it, so that a
// test sees the names that the SDK chooses, and none of them is ever resolved.
type proxy struct {
	refuse int // HTTP status to refuse with; 0: none

	mu      sync.Mutex
	servers map[string]string // host:port to the address that it stands for
	asked   []string          // host of each request
	auth    []string          // Proxy-Authorization of each request
}

// proxied adds a proxy, and leaves it to the SDK to which hosts of AWS it goes.
func (w *world) proxied() *proxy {
	w.t.Helper()
	delete(w.env, "AWS_ENDPOINT_URL_ECR")
	delete(w.env, "AWS_ENDPOINT_URL_STS")
	p := &proxy{servers: map[string]string{}}
	w.env["HTTPS_PROXY"] = w.startHTTP(p)
	return p
}

// serve makes h the server of a host.
func (p *proxy) serve(w *world, host string, h http.Handler) {
	w.t.Helper()
	p.servers[host+":443"] = w.startTLSAs(h, standin.CertOptions{Hosts: []string{host}}).Listener.Addr().String()
}

// hosts returns which hosts were asked for, sorted.
func (p *proxy) hosts() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Compact(slices.Sorted(slices.Values(p.asked)))
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	host, _, _ := strings.Cut(r.Host, ":")
	p.mu.Lock()
	p.asked = append(p.asked, host)
	p.auth = append(p.auth, r.Header.Get("Proxy-Authorization"))
	address := p.servers[r.Host]
	p.mu.Unlock()
	if p.refuse != 0 {
		http.Error(w, "<h1>blocked by policy</h1>", p.refuse)
		return
	}
	server, err := net.Dial("tcp", address)
	if r.Method != http.MethodConnect || err != nil {
		http.Error(w, "<h1>no such host</h1>", http.StatusBadGateway)
		return
	}
	defer server.Close()
	client, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	defer client.Close()
	io.WriteString(client, "HTTP/1.1 200 Connection established\r\n\r\n")
	go func() {
		io.Copy(server, client)
		server.Close()
	}()
	io.Copy(client, server)
}

// answer is an Intercept that answers every request in the same way.
func answer(status int, contentType, body string) standin.Intercept {
	return func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		io.WriteString(w, body)
		return true
	}
}

func ecrError(status int, code, message string) standin.Intercept {
	return func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		standin.AWSError(w, status, code, message)
		return true
	}
}

func stsError(status int, code, message string) standin.Intercept {
	return func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		standin.STSError(w, status, code, message)
		return true
	}
}

func agentError(status int, code, message string) standin.Intercept {
	return func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		standin.PodIdentityError(w, status, code, message)
		return true
	}
}

// unsteady are the forms that differ from run to run, and their names.
var unsteady = []struct {
	form *regexp.Regexp
	name string
}{
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "ADDRESS"},
	{regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`), "UUID"},
	{regexp.MustCompile(`\d{8}T\d{6}Z`), "TIME"},
	{regexp.MustCompile(` expires=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ took=[\d.]+m?s$`), ""},
}

// steady is the last line on stderr without what differs from run to run.
func (w *world) steady(o outcome) string {
	line := strings.ReplaceAll(o.last(), w.dir, "DIR")
	for _, u := range unsteady {
		line = u.form.ReplaceAllLiteralString(line, u.name)
	}
	return line
}

// succeeds checks that o stored the token of w.ecr, with credentials from the source.
func (w *world) succeeds(o outcome, source string) {
	w.t.Helper()
	want := `level=INFO msg="secret created" secret=shop/ecr-credentials registries=` + ecrName + " regions=" + region + " credentials=" + source
	if got := w.steady(o); o.code != exitOK || o.stdout != "" || got != want {
		w.t.Fatalf("exit %d\n got %s\nwant %s", o.code, got, want)
	}
	entry := fmt.Sprintf(`{"username":"AWS","password":%q,"auth":%q}`, ecrPassword, w.ecr.Token())
	if got, want := string(w.secret().Data[".dockerconfigjson"]), fmt.Sprintf(`{"auths":{%q:%s}}`, ecrName, entry); got != want {
		w.t.Errorf("stored %s\n  want %s", got, want)
	}
}

func TestMalformedTokensHaveDistinctMessages(t *testing.T) {
	t.Parallel()
	const password = "p4ssw0rd-of-a-registry"
	encode := base64.StdEncoding.EncodeToString
	host := aws.String("https://" + ecrName)
	expires := aws.Time(time.Now())
	data := func(token string) []types.AuthorizationData {
		return []types.AuthorizationData{{AuthorizationToken: &token, ExpiresAt: expires, ProxyEndpoint: host}}
	}
	good := encode([]byte("AWS:" + password))
	seen := map[string]bool{}
	for _, tt := range []struct {
		name string
		data []types.AuthorizationData
		want string
	}{
		{"no data", nil, "the answer has no authorizationData"},
		{"no token", []types.AuthorizationData{{ExpiresAt: expires, ProxyEndpoint: host}}, "the answer has no authorizationToken"},
		{"not base64", data("!" + good), "the authorizationToken is not base64"},
		{"base64 of URLs", data("AWS-" + password + "_="), "the authorizationToken is not base64"},
		{"no colon", data(encode([]byte("AWS" + password))), "the authorizationToken has no colon between user and password"},
		{"empty user", data(encode([]byte(":" + password))), "the authorizationToken has an empty user"},
		{"empty password", data(encode([]byte("AWS:"))), "the authorizationToken has an empty password"},
		{"line break", data(encode([]byte("AWS:" + password + "\n"))), "the authorizationToken holds characters other than printable ASCII"},
		{"not ASCII", data(encode([]byte("AWS:" + password + "ü"))), "the authorizationToken holds characters other than printable ASCII"},
		{"no expiry", []types.AuthorizationData{{AuthorizationToken: &good, ProxyEndpoint: host}}, "the answer has no expiresAt"},
		{"no registry", []types.AuthorizationData{{AuthorizationToken: &good, ExpiresAt: expires}}, "the answer has no proxyEndpoint, so the registry is not known"},
		{"odd registry", []types.AuthorizationData{{AuthorizationToken: &good, ExpiresAt: expires, ProxyEndpoint: aws.String("https://" + password + "/@")}},
			"the answer's proxyEndpoint is not a registry host"},
	} {
		_, err := parseToken(&ecr.GetAuthorizationTokenOutput{AuthorizationData: tt.data}, nil, &redactor{})
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s: got %v, want %s", tt.name, err, tt.want)
		} else if seen[tt.want] = true; strings.Contains(err.Error(), password) || strings.Contains(err.Error(), good) {
			t.Errorf("%s: the error holds a part of the token: %v", tt.name, err)
		}
	}
	if len(seen) != 10 {
		t.Errorf("%d messages, want 10", len(seen))
	}
}

func TestTokenIsSplitAtTheFirstColonAndItsPartsAreRedacted(t *testing.T) {
	t.Parallel()
	const password = "pass:word:"
	token := base64.StdEncoding.EncodeToString([]byte("AWS:" + password))
	out := &ecr.GetAuthorizationTokenOutput{AuthorizationData: []types.AuthorizationData{{AuthorizationToken: &token, ExpiresAt: aws.Time(time.Unix(1, 0))}}}
	redact := &redactor{}
	got, err := parseToken(out, []string{"a.example", "b.example"}, redact) // the registries are known: no proxyEndpoint is needed
	want := ecrToken{[]string{"a.example", "b.example"}, dockerAuth{"AWS", password, token}, time.Unix(1, 0)}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	if got := redact.text(token + " " + password); got != "[redacted] [redacted]" {
		t.Errorf("not redacted: %s", got)
	}
}

func FuzzDecodeToken(f *testing.F) {
	for _, s := range []string{"", "AWS:password", "AWS:pass:word", "AWS:", ":password", "password", "AWS:\n", "AWS:\xff", "\x00:\x00"} {
		f.Add(s)
		f.Add(base64.StdEncoding.EncodeToString([]byte(s)))
	}
	malformed := regexp.MustCompile(`^the (answer has no authorizationToken|authorizationToken (is not base64|has no colon between user and password|` +
		`has an empty user|has an empty password|holds characters other than printable ASCII))$`)
	f.Fuzz(func(t *testing.T, token string) {
		redact := &redactor{}
		got, err := decodeToken(token, redact)
		if err != nil {
			if !malformed.MatchString(err.Error()) { // so no error can hold a part
				t.Errorf("%q: %v", token, err)
			}
			return
		}
		decoded, err := base64.StdEncoding.DecodeString(token)
		if err != nil || string(decoded) != got.Username+":"+got.Password || strings.Contains(got.Username, ":") ||
			got.Auth != base64.StdEncoding.EncodeToString(decoded) || got.Username == "" || got.Password == "" {
			t.Errorf("%q became %+v", token, got)
		}
		if len(got.Password) >= 4 && strings.Contains(redact.text("-"+got.Password+"-"), got.Password) && !strings.Contains("[redacted]", got.Password) {
			t.Errorf("%q: the password is not redacted", token)
		}
	})
}

func TestEqualInputGivesEqualDockerConfig(t *testing.T) {
	t.Parallel()
	// As docker login writes it, but with the hosts sorted and all three fields.
	const want = `{"auths":{` +
		`"123456789012.dkr.ecr.eu-central-1.amazonaws.com":{"username":"AWS","password":"b:2","auth":"QVdTOmI6Mg=="},` +
		`"123456789012.dkr.ecr.us-east-1.amazonaws.com":{"username":"AWS","password":"a1","auth":"QVdTOmEx"},` +
		`"registry.example:5000":{"username":"AWS","password":"b:2","auth":"QVdTOmI6Mg=="}}}`
	a, b := dockerAuth{"AWS", "a1", "QVdTOmEx"}, dockerAuth{"AWS", "b:2", "QVdTOmI6Mg=="}
	for range 20 { // a map's order changes from one range to the next
		got, err := dockerConfig(map[string]dockerAuth{
			"registry.example:5000":                           b,
			"123456789012.dkr.ecr.us-east-1.amazonaws.com":    a,
			"123456789012.dkr.ecr.eu-central-1.amazonaws.com": b,
		})
		if err != nil || string(got) != want {
			t.Fatalf("got  %s, %v\nwant %s", got, err, want)
		}
	}
}

func TestDockerConfigFitsIntoASecret(t *testing.T) {
	t.Parallel()
	auth := func(n int) map[string]dockerAuth {
		return map[string]dockerAuth{"h": {"AWS", strings.Repeat("p", n), ""}}
	}
	empty, err := dockerConfig(auth(0))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dockerConfig(auth(1<<20 - len(empty))); err != nil {
		t.Errorf("1 MiB: %v", err)
	}
	_, err = dockerConfig(auth(1<<20 - len(empty) + 1))
	checkError(t, "1 MiB and a byte", err, "the docker config has 1048577 bytes, more than the 1048576 that a Secret can hold")
	if !strings.Contains(hintOf(err), "AWS_ENDPOINT_URL_ECR") {
		t.Errorf("hint: %q", hintOf(err))
	}
}

// registryHosts are hosts, the region of those that are ECR's, and why not of those that cannot be one.
var registryHosts = []struct{ host, region, want string }{
	// Standard partition.
	{"123456789012.dkr.ecr.us-east-1.amazonaws.com", "us-east-1", ""},
	{"123456789012.dkr.ecr.eu-central-1.amazonaws.com", "eu-central-1", ""},
	{"000000000000.dkr.ecr.ap-southeast-7.amazonaws.com", "ap-southeast-7", ""},
	{"123456789012.dkr.ecr.il-central-1.amazonaws.com", "il-central-1", ""},
	{"123456789012.dkr.ecr.mx-central-1.amazonaws.com", "mx-central-1", ""},
	{"123456789012.dkr.ecr.af-south-1.amazonaws.com", "af-south-1", ""},
	{"123456789012.dkr.ecr.eu-north-12.amazonaws.com", "eu-north-12", ""}, // a region yet to come
	{"123456789012.dkr.ecr-fips.us-west-2.amazonaws.com", "us-west-2", ""},
	{"123456789012.dkr-ecr.eu-west-1.on.aws", "eu-west-1", ""},
	{"123456789012.dkr-ecr-fips.us-east-2.on.aws", "us-east-2", ""},
	// GovCloud.
	{"123456789012.dkr.ecr.us-gov-west-1.amazonaws.com", "us-gov-west-1", ""},
	{"123456789012.dkr.ecr-fips.us-gov-east-1.amazonaws.com", "us-gov-east-1", ""},
	{"123456789012.dkr-ecr.us-gov-east-1.on.aws", "us-gov-east-1", ""},
	{"123456789012.dkr-ecr-fips.us-gov-west-1.on.aws", "us-gov-west-1", ""},
	// China.
	{"123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1", ""},
	{"123456789012.dkr.ecr.cn-northwest-1.amazonaws.com.cn", "cn-northwest-1", ""},
	{"123456789012.dkr-ecr.cn-north-1.on.amazonwebservices.com.cn", "cn-north-1", ""},
	// EU sovereign.
	{"123456789012.dkr.ecr.eusc-de-east-1.amazonaws.eu", "eusc-de-east-1", ""},
	{"123456789012.dkr-ecr.eusc-de-east-1.on.amazonwebservices.eu", "eusc-de-east-1", ""},
	// The isolated ones.
	{"123456789012.dkr.ecr.us-iso-east-1.c2s.ic.gov", "us-iso-east-1", ""},
	{"123456789012.dkr.ecr-fips.us-iso-west-1.c2s.ic.gov", "us-iso-west-1", ""},
	{"123456789012.dkr-ecr.us-iso-west-1.on.aws.ic.gov", "us-iso-west-1", ""},
	{"123456789012.dkr.ecr.us-isob-east-1.sc2s.sgov.gov", "us-isob-east-1", ""},
	{"123456789012.dkr-ecr.us-isob-east-1.on.aws.scloud", "us-isob-east-1", ""},
	{"123456789012.dkr.ecr.eu-isoe-west-1.cloud.adc-e.uk", "eu-isoe-west-1", ""},
	{"123456789012.dkr-ecr.eu-isoe-west-1.on.cloud-aws.adc-e.uk", "eu-isoe-west-1", ""},
	{"123456789012.dkr.ecr.us-isof-south-1.csp.hci.ic.gov", "us-isof-south-1", ""},
	{"123456789012.dkr-ecr.us-isof-south-1.on.aws.hci.ic.gov", "us-isof-south-1", ""},

	// Parts of two partitions or forms in one host.
	{"123456789012.dkr.ecr.cn-north-1.amazonaws.com", "", "must end in amazonaws.com.cn for dkr.ecr in region cn-north-1"},
	{"123456789012.dkr.ecr.us-east-1.amazonaws.com.cn", "", "must end in amazonaws.com for dkr.ecr in region us-east-1"},
	{"123456789012.dkr.ecr.us-east-1.on.aws", "", "must end in amazonaws.com for dkr.ecr in region us-east-1"},
	{"123456789012.dkr-ecr.us-east-1.amazonaws.com", "", "must end in on.aws for dkr-ecr in region us-east-1"},
	{"123456789012.dkr-ecr.cn-north-1.on.aws", "", "must end in on.amazonwebservices.com.cn for dkr-ecr in region cn-north-1"},
	{"123456789012.dkr.ecr-fips.cn-north-1.amazonaws.com.cn", "", "has the FIPS form, which region cn-north-1 does not have"},
	{"123456789012.dkr.ecr.eusc-de-east-1.amazonaws.com", "", "must end in amazonaws.eu for dkr.ecr in region eusc-de-east-1"},
	{"123456789012.dkr.ecr.eu-central-1.amazonaws.eu", "", "must end in amazonaws.com for dkr.ecr in region eu-central-1"},
	{"123456789012.dkr.ecr.us-iso-east-1.sc2s.sgov.gov", "", "must end in c2s.ic.gov for dkr.ecr in region us-iso-east-1"},
	{"123456789012.dkr.ecr.us-gov-west-1.c2s.ic.gov", "", "must end in amazonaws.com for dkr.ecr in region us-gov-west-1"},
	{"123456789012.dkr.ecr.eu-isof-south-1.csp.hci.ic.gov", "", `has no AWS region in the place of "eu-isof-south-1"`},
	{"123456789012.dkr.ecr.eu-central-1.amazonaws.com.evil.example", "", "must end in amazonaws.com for dkr.ecr in region eu-central-1"},
	{"123456789012.dkr.ecr.eu-central-1.amazonaws.com:443", "", "must end in amazonaws.com for dkr.ecr in region eu-central-1"},
	{"12345678901.dkr.ecr.us-east-1.amazonaws.com", "", "must begin with an account ID of 12 digits, not of 11"},
	{"1234567890123.dkr-ecr.us-east-1.on.aws", "", "must begin with an account ID of 12 digits, not of 13"},
	{"123456789012.dkr.ecr.us-east.amazonaws.com", "", `has no AWS region in the place of "us-east"`},
	{"123456789012.dkr.ecr.xx-east-1.amazonaws.com", "", `has no AWS region in the place of "xx-east-1"`},
	{"123456789012.dkr.ecr.us-east-1a.amazonaws.com", "", `has no AWS region in the place of "us-east-1a"`},
	{"my-account.dkr.ecr.us-east-1.amazonaws.com", "", "is a host of AWS but no registry: it must be <account>.dkr.ecr.<region>.amazonaws.com"},
	{"dkr.ecr.us-east-1.amazonaws.com", "", "is a host of AWS but no registry: it must be <account>.dkr.ecr.<region>.amazonaws.com"},
	{"api.ecr.us-east-1.amazonaws.com", "", "is a host of AWS but no registry: it must be <account>.dkr.ecr.<region>.amazonaws.com"},
	{"123456789012.dkr.erc.us-east-1.amazonaws.com", "", "is a host of AWS but no registry: it must be <account>.dkr.ecr.<region>.amazonaws.com"},
	{"123456789012.dkr-ecr-flips.us-east-1.on.aws", "", "is a host of AWS but no registry: it must be <account>.dkr.ecr.<region>.amazonaws.com"},
	{"public.ecr.aws", "", "is Amazon ECR Public, which has another API and lets everybody pull: it needs no Secret"},
	{"ecr-public.aws.com", "", "is Amazon ECR Public, which has another API and lets everybody pull: it needs no Secret"}, // its dual-stack host

	// Not ECR's: --region is needed.
	{"vpce-0123456789abcdef0-abcdefgh.dkr.ecr.us-east-1.vpce.amazonaws.com", "", ""},
	{"registry.example", "", ""},
	{"registry.example:5000", "", ""},
	{"localhost:5000", "", ""},
	{"ghcr.io", "", ""},
	{"ecr.example", "", ""},
	{"internal-proxy-1234.us-east-1.elb.amazonaws.com", "", ""},

	// Not a host.
	{"", "", "is not a host name"},
	{"-registry.example", "", "is not a host name"},
	{"registry..example", "", "is not a host name"},
	{"registry.example.", "", "is not a host name"},
	{strings.Repeat("a.", 126) + "ab", "", "is not a host name"},
	{"registry.example:", "", "has no valid port after its ':'"},
	{"registry.example:0", "", "has no valid port after its ':'"},
	{"registry.example:65536", "", "has no valid port after its ':'"},
	{"registry.example:latest", "", "has no valid port after its ':'"},
	{"http://123456789012.dkr.ecr.us-east-1.amazonaws.com", "", "is more than a host: leave out scheme and path"},
	{"123456789012.dkr.ecr.us-east-1.amazonaws.com/app", "", "is more than a host: leave out scheme and path"},
	{"123456789012.dkr.ecr.us-east-1.amazonaws.com/app:v1", "", "is more than a host: leave out scheme and path"},
	{"123456789012.DKR.ecr.us-east-1.amazonaws.com", "", "has the character 'D' (U+0044), which no registry host has"},
	{"123456789012.dkr.ecr.us—east—1.amazonaws.com", "", "has the character '—' (U+2014), which no registry host has"},
	{"123456789012.dkr.ecr.us-east-1.amazonaws.com ", "", "has the character ' ' (U+0020), which no registry host has"},
	{"user@registry.example", "", "has the character '@' (U+0040), which no registry host has"},
	{"registry\xff.example", "", "has the character '\ufffd' (U+FFFD), which no registry host has"},
	{"[::1]:5000", "", "has no valid port after its ':'"},
}

func TestRegistryRegionKnowsEveryPartition(t *testing.T) {
	t.Parallel()
	for _, tt := range registryHosts {
		region, err := registryRegion(tt.host)
		message := ""
		if err != nil {
			message = err.Error()
		}
		if region != tt.region || message != tt.want {
			t.Errorf("%q: got %q, %q, want %q, %q", tt.host, region, message, tt.region, tt.want)
		}
	}
}

func FuzzRegistryRegion(f *testing.F) {
	for _, tt := range registryHosts {
		f.Add(tt.host)
	}
	suffixes := []string{"amazonaws.com", "on.aws", "amazonaws.com.cn", "on.amazonwebservices.com.cn", "amazonaws.eu", "on.amazonwebservices.eu",
		"c2s.ic.gov", "on.aws.ic.gov", "sc2s.sgov.gov", "on.aws.scloud", "cloud.adc-e.uk", "on.cloud-aws.adc-e.uk", "csp.hci.ic.gov", "on.aws.hci.ic.gov"}
	account, ecrRegion := regexp.MustCompile(`^[0-9]{12}$`), regexp.MustCompile(`^[a-z]+(-[a-z]+)+-[0-9]+$`)
	f.Fuzz(func(t *testing.T, host string) {
		region, err := registryRegion(host)
		if err != nil || region == "" {
			if region != "" {
				t.Errorf("%q: region %q and %v", host, region, err)
			}
			return
		}
		// An accepted host is its parts, and nothing more.
		for _, kind := range []string{"dkr.ecr", "dkr.ecr-fips", "dkr-ecr", "dkr-ecr-fips"} {
			for _, suffix := range suffixes {
				if account.MatchString(host[:12]) && ecrRegion.MatchString(region) && host == host[:12]+"."+kind+"."+region+"."+suffix {
					return
				}
			}
		}
		t.Errorf("%q is no ECR host, but lies in %s", host, region)
	})
}

func TestContainerCredentialsComeFromAllowedHostsOnly(t *testing.T) {
	t.Parallel()
	plain := func(host string) string {
		return fmt.Sprintf("it is plain http to %q, a host other than loopback, 169.254.170.2, 169.254.170.23 and [fd00:ec2::23]: use https", host)
	}
	const malformed = "it is not an http or https URL without a user"
	for in, want := range map[string]string{
		"http://169.254.170.23/v1/credentials": "",
		"http://169.254.170.2/v2/credentials":  "",
		"http://[fd00:ec2::23]/v1/credentials": "",
		"http://[fd00:0ec2:0:0::23]:80/":       "",
		"http://localhost:8080/":               "",
		"http://127.0.0.1/":                    "",
		"http://127.255.255.254:1/":            "",
		"http://[::1]:8080/":                   "",
		"http://[::ffff:127.0.0.1]/":           "",
		"https://agent.example/v1/credentials": "",
		"https://169.254.169.254/":             "",
		"HTTPS://agent.example":                "",

		"http://169.254.170.23.evil.com/":         plain("169.254.170.23.evil.com"),
		"http://localhost.evil.com/":              plain("localhost.evil.com"),
		"http://127.0.0.1.evil.com/":              plain("127.0.0.1.evil.com"),
		"http://evil.com/169.254.170.23":          plain("evil.com"),
		"http://evil.com#@169.254.170.23/":        plain("evil.com"),
		"http://evil.com?@169.254.170.23/":        plain("evil.com"),
		"http://169.254.170.23./":                 plain("169.254.170.23."),
		"http://localhost./":                      plain("localhost."),
		"http://169.254.169.254/":                 plain("169.254.169.254"),
		"http://169.254.170.230/":                 plain("169.254.170.230"),
		"http://169.254.170.3/":                   plain("169.254.170.3"),
		"http://10.0.0.1/":                        plain("10.0.0.1"),
		"http://0.0.0.0/":                         plain("0.0.0.0"),
		"http://2852039191/":                      plain("2852039191"),            // 169.254.170.23 as one decimal number
		"http://0xa9feaa17/":                      plain("0xa9feaa17"),            // and as a hexadecimal one
		"http://0251.0376.0252.027/":              plain("0251.0376.0252.027"),    // and in octal
		"http://169.254.170.023/":                 plain("169.254.170.023"),       // some read 19
		"http://127.1/":                           plain("127.1"),                 // some read 127.0.0.1
		"http://[fd00:ec2::23%25eth0]/":           plain("fd00:ec2::23%eth0"),     // a zone
		"http://[::1%25lo]/":                      plain("::1%lo"),                // also on loopback
		"http://[::ffff:169.254.170.23]/":         plain("::ffff:169.254.170.23"), // IPv4 in IPv6
		"http://[fd00:ec2::24]/":                  plain("fd00:ec2::24"),
		"http://[::]/":                            plain("::"),
		"http://１６９.254.170.23/":                  plain("１６９.254.170.23"), // full-width digits
		"http://169.254.170.23@evil.com/":         malformed,
		"http://user:pass@169.254.170.23/":        malformed,
		"https://user:pass@agent.example/":        malformed,
		"http://169.254.170.23\\@evil.com/":       malformed,
		"http://169.254.170.23:80:80/":            malformed,
		"http://[fd00:ec2::23/":                   malformed,
		"http:///v1/credentials":                  malformed,
		"http:169.254.170.23/v1":                  malformed,
		"//169.254.170.23/v1":                     malformed,
		"169.254.170.23/v1/credentials":           malformed,
		"ftp://169.254.170.23/":                   malformed,
		"file:///etc/passwd":                      malformed,
		"http://169.254.170.23/\r\nX-Forged: yes": malformed,
		"": malformed,
	} {
		message := ""
		if err := checkContainerURL(in); err != nil {
			message = err.Error()
		}
		if message != want {
			t.Errorf("%q:\n got %q\nwant %q", in, message, want)
		}
	}
}

func TestOneSourceIsChosenByTheEnvironment(t *testing.T) {
	t.Parallel()
	with := func(pairs ...string) map[string]string {
		env := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			env[pairs[i]] = pairs[i+1]
		}
		return env
	}
	notPEM := t.TempDir() + "/ca.pem"
	if err := os.WriteFile(notPEM, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	const (
		keyID, key    = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
		role, file    = "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"
		relative, uri = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"
		agent         = "http://169.254.170.23/v1/credentials"
		notARN        = " is not the ARN of a role, such as arn:aws:iam::123456789012:role/NAME"
		lineBreak     = ": it holds a line break, or white space at an end: was the Secret made with echo instead of printf?"
	)
	type sources = []credentialSource
	for _, tt := range []struct {
		env     map[string]string
		source  credentialSource
		ignored sources
		errs    []string
	}{
		{env: with(), source: instanceMetadata},
		{env: with("AWS_EC2_METADATA_DISABLED", "false"), source: instanceMetadata},
		{env: with("AWS_SESSION_TOKEN", "x"), source: instanceMetadata},
		{env: with("AWS_CONTAINER_AUTHORIZATION_TOKEN", "x"), source: instanceMetadata},
		{env: with("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://[fd00:ec2::254]"), source: instanceMetadata},
		{env: with("AWS_EC2_METADATA_DISABLED", "true"), source: instanceMetadata,
			errs: []string{"invalid environment: no AWS credentials: " + sourceHelp + "; the instance's role is switched off by AWS_EC2_METADATA_DISABLED"}},
		{env: with("AWS_EC2_METADATA_DISABLED", "TRUE"), source: instanceMetadata,
			errs: []string{"invalid environment: no AWS credentials: " + sourceHelp + "; the instance's role is switched off by AWS_EC2_METADATA_DISABLED"}},

		{env: with(keyID, "AKIA", key, "secret"), source: accessKeys},
		{env: with(keyID, "AKIA", key, "secret", "AWS_EC2_METADATA_DISABLED", "true"), source: accessKeys},
		{env: with(keyID, "AKIA"), source: accessKeys, errs: []string{"invalid environment: AWS_ACCESS_KEY_ID is set, but AWS_SECRET_ACCESS_KEY is not"}},
		{env: with(key, "secret"), source: accessKeys, errs: []string{"invalid environment: AWS_SECRET_ACCESS_KEY is set, but AWS_ACCESS_KEY_ID is not"}},

		{env: with(role, webRole, file, "/token"), source: webIdentity},
		{env: with(role, webRole, file, "/token", "AWS_ROLE_SESSION_NAME", "me@x"), source: webIdentity},
		{env: with(role, "arn:aws-cn:iam::123456789012:role/a/path/name", file, "/token"), source: webIdentity},
		{env: with(role, webRole), source: webIdentity, errs: []string{"invalid environment: AWS_ROLE_ARN is set, but AWS_WEB_IDENTITY_TOKEN_FILE is not"}},
		{env: with(file, "/token"), source: webIdentity, errs: []string{"invalid environment: AWS_WEB_IDENTITY_TOKEN_FILE is set, but AWS_ROLE_ARN is not"}},

		{env: with(uri, agent), source: container},
		{env: with(relative, "/v2/x"), source: container},
		{env: with(relative, "/v2/x", uri, "http://evil.com"), source: container}, // the SDKs never look at the second
		{env: with(uri, "http://evil.com/"), source: container, errs: []string{
			`invalid environment AWS_CONTAINER_CREDENTIALS_FULL_URI: it is plain http to "evil.com", a host other than loopback, 169.254.170.2, 169.254.170.23 and [fd00:ec2::23]: use https`}},
		{env: with(uri, "http://user:hunter2@169.254.170.23/"), source: container, errs: []string{
			`invalid environment AWS_CONTAINER_CREDENTIALS_FULL_URI: it is not an http or https URL without a user`}},
		{env: with(relative, "@evil.com/"), source: container, errs: []string{
			`invalid environment AWS_CONTAINER_CREDENTIALS_RELATIVE_URI: "@evil.com/" does not begin with a slash`}},
		{env: with(relative, ".evil.com/"), source: container, errs: []string{
			`invalid environment AWS_CONTAINER_CREDENTIALS_RELATIVE_URI: ".evil.com/" does not begin with a slash`}},
		{env: with(relative, ":80@evil.com/"), source: container, errs: []string{
			`invalid environment AWS_CONTAINER_CREDENTIALS_RELATIVE_URI: ":80@evil.com/" does not begin with a slash`}},

		{env: with(keyID, "AKIA", key, "secret", role, webRole, file, "/token"), source: accessKeys, ignored: sources{webIdentity}},
		{env: with(keyID, "AKIA", key, "secret", uri, agent), source: accessKeys, ignored: sources{container}},
		{env: with(role, webRole, file, "/token", uri, agent), source: webIdentity, ignored: sources{container}},
		{env: with(keyID, "AKIA", key, "secret", role, webRole, file, "/token", uri, agent), source: accessKeys, ignored: sources{webIdentity, container}},
		{env: with(keyID, "AKIA", key, "secret", role, webRole), source: accessKeys, ignored: sources{webIdentity},
			errs: []string{"invalid environment: AWS_ROLE_ARN is set, but AWS_WEB_IDENTITY_TOKEN_FILE is not"}},

		// What is wrong with a value, each with its variable; all of them at once, in a fixed order.
		{env: with(keyID, "AKIA", key, "secret", "AWS_PROFILE", "dev"), source: accessKeys,
			errs: []string{"invalid environment AWS_PROFILE: profiles and shared files are not read; " + sourceHelp}},
		{env: with(keyID, "AKIA\n", key, "secret\r\n", "AWS_SESSION_TOKEN", " x"), source: accessKeys, errs: []string{
			"invalid environment AWS_ACCESS_KEY_ID" + lineBreak, "invalid environment AWS_SECRET_ACCESS_KEY" + lineBreak, "invalid environment AWS_SESSION_TOKEN" + lineBreak}},
		{env: with(uri, agent, "AWS_CONTAINER_AUTHORIZATION_TOKEN", "a\r\nX-Forged: b"), source: container,
			errs: []string{"invalid environment AWS_CONTAINER_AUTHORIZATION_TOKEN" + lineBreak}},
		{env: with(uri, agent, "AWS_CONTAINER_AUTHORIZATION_TOKEN", "Basic dXNlcg=="), source: container},
		{env: with(role, "refresher", file, "/token", "--assume-role-arn", "arn:aws:iam::123456789012:user/me"), source: webIdentity, errs: []string{
			`invalid environment AWS_ROLE_ARN: "refresher"` + notARN, `invalid flag --assume-role-arn: "arn:aws:iam::123456789012:user/me"` + notARN}},
		{env: with(role, webRole, file, "/token", "AWS_ROLE_SESSION_NAME", "a b"), source: webIdentity,
			errs: []string{`invalid environment AWS_ROLE_SESSION_NAME: "a b" is not 2 to 64 letters, digits and _+=,.@-`}},
		{env: with(role, webRole, file, "/token", "AWS_ROLE_SESSION_NAME", "a"), source: webIdentity,
			errs: []string{`invalid environment AWS_ROLE_SESSION_NAME: "a" is not 2 to 64 letters, digits and _+=,.@-`}},
		{env: with("--assume-role-external-id", "x"), source: instanceMetadata,
			errs: []string{"invalid flag --assume-role-external-id: it is of use with --assume-role-arn only"}},
		{env: with("AWS_EC2_METADATA_SERVICE_ENDPOINT", "169.254.169.254"), source: instanceMetadata,
			errs: []string{`invalid environment AWS_EC2_METADATA_SERVICE_ENDPOINT: "169.254.169.254" is not an http or https URL`}},
		{env: with("AWS_ENDPOINT_URL_ECR", "localhost:4566", "AWS_ENDPOINT_URL_STS", "ftp://x"), source: instanceMetadata, errs: []string{
			`invalid environment AWS_ENDPOINT_URL_ECR: "localhost:4566" is not an http or https URL`, `invalid environment AWS_ENDPOINT_URL_STS: "ftp://x" is not an http or https URL`}},
		{env: with("AWS_USE_FIPS_ENDPOINT", "yes", "AWS_USE_DUALSTACK_ENDPOINT", "1"), source: instanceMetadata, errs: []string{
			`invalid environment AWS_USE_FIPS_ENDPOINT: "yes" is neither true nor false`, `invalid environment AWS_USE_DUALSTACK_ENDPOINT: "1" is neither true nor false`}},
		{env: with("AWS_ENDPOINT_URL", "https://x", "AWS_USE_FIPS_ENDPOINT", "true", "AWS_USE_DUALSTACK_ENDPOINT", "True"), source: instanceMetadata, errs: []string{
			"invalid environment AWS_USE_FIPS_ENDPOINT: it chooses an endpoint, and so does AWS_ENDPOINT_URL: unset one",
			"invalid environment AWS_USE_DUALSTACK_ENDPOINT: it chooses an endpoint, and so does AWS_ENDPOINT_URL: unset one"}},
		{env: with("AWS_ENDPOINT_URL_STS", "https://x", "AWS_USE_FIPS_ENDPOINT", "true"), source: instanceMetadata}, // STS is not called
		{env: with(role, webRole, file, "/token", "AWS_ENDPOINT_URL_STS", "https://x", "AWS_USE_FIPS_ENDPOINT", "true"), source: webIdentity,
			errs: []string{"invalid environment AWS_USE_FIPS_ENDPOINT: it chooses an endpoint, and so does AWS_ENDPOINT_URL: unset one"}},
		{env: with("AWS_MAX_ATTEMPTS", "0"), source: instanceMetadata, errs: []string{`invalid environment AWS_MAX_ATTEMPTS: "0" is not a whole number above zero`}},
		{env: with("AWS_MAX_ATTEMPTS", "many"), source: instanceMetadata, errs: []string{`invalid environment AWS_MAX_ATTEMPTS: "many" is not a whole number above zero`}},
		{env: with("HTTPS_PROXY", "http://user:hunter2%@proxy"), source: instanceMetadata, errs: []string{"invalid environment HTTPS_PROXY: it is not a URL"}},
		{env: with("https_proxy", "proxy:3128"), source: instanceMetadata},
		{env: with("AWS_CA_BUNDLE", "/nonexistent/ca.pem"), source: instanceMetadata,
			errs: []string{"invalid environment AWS_CA_BUNDLE: open /nonexistent/ca.pem: no such file or directory"}},
		{env: with("AWS_CA_BUNDLE", notPEM), source: instanceMetadata, errs: []string{"invalid environment AWS_CA_BUNDLE: " + notPEM + " holds no certificate"}},
	} {
		a := &awsSettings{assumeRoleARN: tt.env["--assume-role-arn"], assumeRoleExternalID: tt.env["--assume-role-external-id"]}
		var errs []string
		a.parse(func(name string) string { return tt.env[name] }, &redactor{}, func(name, format string, args ...any) {
			errs = append(errs, "invalid "+name+": "+fmt.Sprintf(format, args...))
		})
		if a.source != tt.source || len(a.ignored) != len(tt.ignored) || len(a.ignored) > 0 && !slices.Equal(a.ignored, tt.ignored) {
			t.Errorf("%v: source %v, ignored %v; want %v, %v", tt.env, a.source, a.ignored, tt.source, tt.ignored)
		}
		if !slices.Equal(errs, tt.errs) {
			t.Errorf("%v:\n got %q\nwant %q", tt.env, errs, tt.errs)
		}
	}
}

// signedRegion returns the region that a request was signed for.
func signedRegion(r standin.Request) string {
	parts := strings.Split(r.Header.Get("Authorization"), "/")
	if len(parts) < 3 {
		return ""
	}
	return parts[2]
}

func TestEveryVariableOfAWSIsHonoured(t *testing.T) {
	t.Parallel()
	const made = "ecr.example.onion" // a host name of which Go's resolver asks no server (RFC 7686)
	for variable, test := range map[string]func(t *testing.T, w *world){
		"AWS_REGION": func(t *testing.T, w *world) {
			w.env["AWS_REGION"], w.env["AWS_DEFAULT_REGION"] = "eu-west-1", "us-east-1"
			w.ecr.Region = "eu-west-1"
			if o := w.run(); o.code != exitOK || !strings.Contains(o.last(), " regions=eu-west-1 ") {
				t.Errorf("exit %d: %s", o.code, o.last())
			}
		},
		"AWS_DEFAULT_REGION": func(t *testing.T, w *world) {
			delete(w.env, "AWS_REGION")
			w.env["AWS_DEFAULT_REGION"] = "us-east-1"
			w.ecr.Region = "us-east-1"
			if o := w.run(); o.code != exitOK || !strings.Contains(o.last(), " regions=us-east-1 ") {
				t.Errorf("exit %d: %s", o.code, o.last())
			}
		},
		"AWS_ENDPOINT_URL": func(t *testing.T, w *world) {
			sts := w.irsa()
			delete(w.env, "AWS_ENDPOINT_URL_STS")
			delete(w.env, "AWS_ENDPOINT_URL_ECR")
			w.env["AWS_ENDPOINT_URL"] = w.startTLS(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
				if r.Header.Get("X-Amz-Target") == "" {
					sts.ServeHTTP(rw, r)
				} else {
					w.ecr.ServeHTTP(rw, r)
				}
			})).URL
			w.succeeds(w.run("--timeout", "5s"), `"web identity (IRSA)"`)
		},
		"AWS_ENDPOINT_URL_ECR": func(t *testing.T, w *world) {
			w.env["AWS_ENDPOINT_URL"] = "https://" + w.closed()
			w.succeeds(w.run("--timeout", "5s"), `"access keys"`)
		},
		"AWS_ENDPOINT_URL_STS": func(t *testing.T, w *world) {
			w.irsa()
			w.env["AWS_ENDPOINT_URL"] = "https://" + w.closed()
			w.succeeds(w.run("--timeout", "5s"), `"web identity (IRSA)"`)
		},
		"AWS_USE_FIPS_ENDPOINT": func(t *testing.T, w *world) {
			sts, p := w.irsa(), w.proxied()
			p.serve(w, "sts-fips.eu-central-1.amazonaws.com", sts)
			p.serve(w, "api.ecr-fips.eu-central-1.amazonaws.com", w.ecr)
			w.env["AWS_USE_FIPS_ENDPOINT"] = "true"
			w.succeeds(w.run("--timeout", "5s"), `"web identity (IRSA)"`)
			if got, want := p.hosts(), []string{"api.ecr-fips.eu-central-1.amazonaws.com", "sts-fips.eu-central-1.amazonaws.com"}; !slices.Equal(got, want) {
				t.Errorf("hosts %q, want %q", got, want)
			}
		},
		"AWS_USE_DUALSTACK_ENDPOINT": func(t *testing.T, w *world) {
			sts, p := w.irsa(), w.proxied()
			p.serve(w, "sts.eu-central-1.api.aws", sts)
			p.serve(w, "ecr.eu-central-1.api.aws", w.ecr)
			w.env["AWS_USE_DUALSTACK_ENDPOINT"] = "true"
			w.succeeds(w.run("--timeout", "5s"), `"web identity (IRSA)"`)
			if got, want := p.hosts(), []string{"ecr.eu-central-1.api.aws", "sts.eu-central-1.api.aws"}; !slices.Equal(got, want) {
				t.Errorf("hosts %q, want %q", got, want)
			}
		},
		"AWS_CA_BUNDLE": func(t *testing.T, w *world) {
			w.succeeds(w.run("--timeout", "5s"), `"access keys"`) // the system's CAs do not know the stand-in's
		},
		"AWS_MAX_ATTEMPTS": func(t *testing.T, w *world) {
			w.ecr.Intercept = ecrError(500, "ServerException", "")
			for attempts, want := range map[string]int{"1": 1, "2": 2} {
				w.env["AWS_MAX_ATTEMPTS"] = attempts
				before := len(w.ecr.Requests())
				if o := w.run(); o.code != exitFailure || len(w.ecr.Requests())-before != want {
					t.Errorf("%s: exit %d after %d requests", attempts, o.code, len(w.ecr.Requests())-before)
				}
			}
		},
		"HTTPS_PROXY": func(t *testing.T, w *world) {
			p := w.proxied()
			w.env["AWS_ENDPOINT_URL_ECR"] = "https://" + made
			p.serve(w, made, w.ecr)
			proxy, err := url.Parse(w.env["HTTPS_PROXY"])
			if err != nil {
				t.Fatal(err)
			}
			proxy.User = url.UserPassword("me", issuedSecret)
			w.env["HTTPS_PROXY"] = proxy.String()
			w.succeeds(w.run("--timeout", "5s"), `"access keys"`)
			if want := "Basic " + base64.StdEncoding.EncodeToString([]byte("me:"+issuedSecret)); len(p.hosts()) != 1 || !slices.Equal(p.auth, []string{want}) {
				t.Errorf("the proxy saw %q", p.auth)
			}
		},
		"NO_PROXY": func(t *testing.T, w *world) {
			p := w.proxied()
			w.env["AWS_ENDPOINT_URL_ECR"], w.env["AWS_MAX_ATTEMPTS"] = "https://"+made, "1"
			p.serve(w, made, w.ecr)
			w.env["NO_PROXY"] = ".example.onion"
			if o := w.run("--timeout", "5s"); o.code != exitFailure || len(p.hosts()) > 0 {
				t.Errorf("exit %d, the proxy was asked for %q: %s", o.code, p.hosts(), o.last())
			}
		},
		"AWS_ROLE_SESSION_NAME": func(t *testing.T, w *world) {
			sts := w.irsa()
			sts.Issue = hop
			for _, want := range []string{"ecr-refresher", "me@shop"} {
				if want == "me@shop" {
					w.env["AWS_ROLE_SESSION_NAME"] = want
				}
				before := len(sts.Requests())
				if o := w.run("--assume-role-arn", otherRole); o.code != exitOK {
					t.Fatalf("exit %d: %s", o.code, o.last())
				}
				for _, r := range sts.Requests()[before:] {
					form, err := url.ParseQuery(string(r.Body))
					if got := form.Get("RoleSessionName"); err != nil || got != want {
						t.Errorf("%s: RoleSessionName %q, want %q", form.Get("Action"), got, want)
					}
				}
			}
		},
		"AWS_EC2_METADATA_SERVICE_ENDPOINT": func(t *testing.T, w *world) {
			w.imds()
			w.succeeds(w.run("--timeout", "5s"), `"instance metadata"`)
		},
		"AWS_EC2_METADATA_DISABLED": func(t *testing.T, w *world) {
			imds := w.imds()
			w.env["AWS_EC2_METADATA_DISABLED"] = "true"
			if o := w.run(); o.code != exitUsage || len(imds.Requests()) > 0 {
				t.Errorf("exit %d after %d requests: %s", o.code, len(imds.Requests()), o.last())
			}
		},
	} {
		t.Run(variable, func(t *testing.T) {
			t.Parallel()
			test(t, newWorld(t))
		})
	}
}

func TestEverySourceSucceedsAndIsNamed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, source string
		arrange      func(w *world)
	}{
		{"access keys", `"access keys"`, func(*world) {}},
		{"access keys without a session", `"access keys"`, func(w *world) {
			w.ecr.Allow(standin.Key{ID: accessKey.ID, Secret: awsSecret})
			delete(w.env, "AWS_SESSION_TOKEN")
		}},
		{"IRSA", `"web identity (IRSA)"`, func(w *world) { w.irsa() }},
		{"Pod Identity", `"container (EKS Pod Identity, ECS)"`, func(w *world) { w.podIdentity() }},
		{"Pod Identity with a token", `"container (EKS Pod Identity, ECS)"`, func(w *world) {
			w.podIdentity()
			delete(w.env, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
			w.env["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = jwt
		}},
		{"Pod Identity with both", `"container (EKS Pod Identity, ECS)"`, func(w *world) {
			w.podIdentity()
			w.env["AWS_CONTAINER_AUTHORIZATION_TOKEN"] = "stale" // the file's token counts: it is renewed
		}},
		{"agent over TLS", `"container (EKS Pod Identity, ECS)"`, func(w *world) {
			w.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = w.startTLS(w.podIdentity()).URL + "/v1/credentials"
		}},
		{"instance metadata", `"instance metadata"`, func(w *world) { w.imds() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			tt.arrange(w)
			o := w.run()
			w.succeeds(o, tt.source)
			if n := strings.Count(o.stderr, "\n"); n != 1 {
				t.Errorf("%d lines on stderr, want 1:\n%s", n, o.stderr)
			}
		})
	}
}

// The agents are on this very host, and what is sent there would be in clear to a proxy.
func TestAgentAndMetadataAreAskedWithoutProxy(t *testing.T) {
	t.Parallel()
	for name, arrange := range map[string]func(w *world){
		"TLS agent": func(w *world) { w.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = "https://agent.example.onion/" },
		"metadata":  func(w *world) { w.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = "http://metadata.example.onion" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := w.proxied()
			w.clearSource()
			w.env["HTTP_PROXY"] = w.env["HTTPS_PROXY"]
			arrange(w)
			if o := w.run("--timeout", "500ms"); o.code != exitFailure || len(p.hosts()) > 0 {
				t.Errorf("exit %d, the proxy was asked for %q: %s", o.code, p.hosts(), o.last())
			}
		})
	}
}

func TestRelativeURIMeansTheAgentOfECS(t *testing.T) {
	var a awsSettings
	a.parse(func(name string) string {
		return map[string]string{
			"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/credentials/x",
			"AWS_CONTAINER_CREDENTIALS_FULL_URI":     "http://127.0.0.1/ignored", // as in the SDKs, the relative one counts
		}[name]
	}, &redactor{}, func(name, format string, args ...any) { t.Errorf(name+": "+format, args...) })
	if a.source != container || a.containerURL != "http://169.254.170.2/v2/credentials/x" {
		t.Errorf("source %v, URL %q", a.source, a.containerURL)
	}
}

// TestPublicRootsAreInTheBinary runs itself as a process without CAs of the system, as the image has none, and as one
// with a single CA in SSL_CERT_FILE.
func TestPublicRootsAreInTheBinary(t *testing.T) {
	if want := os.Getenv("TEST_WANT_ROOTS"); want != "" {
		roots := publicRoots()
		own, err := os.ReadFile(os.Getenv("TEST_OWN_CA"))
		if err != nil {
			t.Fatal(err)
		}
		single := x509.NewCertPool()
		single.AppendCertsFromPEM(own)
		found := false
		for root := range bundle.Roots() {
			if cert, err := x509.ParseCertificate(root.Certificate); err == nil && cert.Subject.CommonName == "Amazon Root CA 1" {
				found = true
				if _, err := cert.Verify(x509.VerifyOptions{Roots: roots}); (err == nil) != (want == "public") {
					t.Errorf("Amazon's root: %v", err)
				}
			}
		}
		if !found || roots.Equal(single) != (want == "own") {
			t.Errorf("Amazon's root is in the bundle: %v; the roots are the own CA: %v", found, roots.Equal(single))
		}
		return
	}
	w := newWorld(t)
	for want, file := range map[string]string{"public": "/nonexistent", "own": w.env["AWS_CA_BUNDLE"]} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestPublicRootsAreInTheBinary$")
		cmd.Env = []string{"TEST_WANT_ROOTS=" + want, "TEST_OWN_CA=" + w.env["AWS_CA_BUNDLE"], "SSL_CERT_FILE=" + file, "SSL_CERT_DIR=/nonexistent",
			"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", want, err, out)
		}
	}
}

func TestTokenFilesAreReadAtTheCall(t *testing.T) {
	t.Parallel()
	const rotated = jwt + "-rotated"
	for name, arrange := range map[string]func(w *world) (tokenFile string){
		"web-identity-token": func(w *world) string { w.irsa().WebIdentityToken = rotated; return "web-identity-token" },
		"pod-identity-token": func(w *world) string { w.podIdentity().Token = rotated; return "pod-identity-token" },
	} {
		w := newWorld(t)
		file := arrange(w)
		a := &awsSettings{stsRegion: region}
		redact := &redactor{}
		a.parse(func(name string) string { return w.env[name] }, redact, func(name, format string, args ...any) {
			t.Fatalf("%s: "+format, append([]any{name}, args...)...)
		})
		w.file(file, rotated)
		creds, err := a.credentials(t.Context(), redact, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, err := creds.Retrieve(t.Context()); err != nil || got.AccessKeyID != issued.ID || got.SessionToken != issuedToken {
			t.Errorf("%s: key %s, %v", name, got.AccessKeyID, err)
		}
		if text := redact.text(rotated + issuedSecret + issuedToken); text != "[redacted][redacted][redacted]" {
			t.Errorf("%s: not redacted: %s", name, text)
		}
	}
}

func TestSecondSourceIsOneWarning(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	imds, sts := w.imds(), w.irsa()
	w.env["AWS_ACCESS_KEY_ID"], w.env["AWS_SECRET_ACCESS_KEY"], w.env["AWS_SESSION_TOKEN"] = accessKey.ID, accessKey.Secret, accessKey.SessionToken
	o := w.run()
	w.succeeds(o, `"access keys"`)
	lines := strings.Split(o.stderr, "\n")
	const want = `level=WARN msg="more than one source of AWS credentials is configured" used="access keys" ignored="web identity (IRSA)"`
	if len(lines) != 3 || !strings.HasSuffix(lines[0], want) {
		t.Errorf("got %s", o.stderr)
	}
	if len(sts.Requests())+len(imds.Requests()) > 0 {
		t.Error("an ignored source was asked")
	}
}

// A silent fall-back to the node's role hides that the pod's own identity is broken.
func TestFailingSourceNeverFallsThrough(t *testing.T) {
	t.Parallel()
	for name, breaks := range map[string]func(w *world, sts *standin.STS, agent *standin.PodIdentity){
		"access keys": func(w *world, _ *standin.STS, _ *standin.PodIdentity) {
			w.env["AWS_ACCESS_KEY_ID"], w.env["AWS_SECRET_ACCESS_KEY"] = "AKIAUNKNOWN", "unknown"
		},
		"web identity": func(w *world, sts *standin.STS, _ *standin.PodIdentity) {
			sts.Intercept = stsError(403, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity")
		},
		"web identity, no file": func(w *world, _ *standin.STS, _ *standin.PodIdentity) {
			w.env["AWS_WEB_IDENTITY_TOKEN_FILE"] = w.dir + "/missing"
		},
		"container": func(w *world, _ *standin.STS, agent *standin.PodIdentity) {
			delete(w.env, "AWS_ROLE_ARN")
			delete(w.env, "AWS_WEB_IDENTITY_TOKEN_FILE")
			agent.Intercept = agentError(404, "ResourceNotFoundException", "No association found")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.env["AWS_MAX_ATTEMPTS"] = "1"
			imds, agent := w.imds(), w.podIdentity()
			sts := w.irsa()
			breaks(w, sts, agent)
			o := w.run()
			if o.code != exitFailure || w.secret() != nil {
				t.Errorf("exit %d, Secret %+v: %s", o.code, w.secret(), o.last())
			}
			asked := map[string]int{"access keys": 0, "web identity": len(sts.Requests()), "container": len(agent.Requests())}
			source, _, _ := strings.Cut(name, ",")
			for other, n := range asked {
				if other != source && n > 0 {
					t.Errorf("%s was asked", other)
				}
			}
			if len(imds.Requests()) > 0 {
				t.Error("the metadata service was asked")
			}
		})
	}
}

func TestRoleIsAssumedBeforeTheECRCall(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, source string
		identity     standin.Key // that assumes the role
		externalID   string
		arrange      func(w *world) *standin.STS
	}{
		{"from keys", `"access keys"`, accessKey, "", (*world).sts},
		{"from keys with external ID", `"access keys"`, accessKey, "team-7/eu", (*world).sts},
		{"from IRSA", `"web identity (IRSA)"`, hop, "", (*world).irsa},
		{"from IRSA with external ID", `"web identity (IRSA)"`, hop, "team-7/eu", (*world).irsa},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			sts := tt.arrange(w)
			sts.Issue = hop
			sts.ExternalID = tt.externalID
			w.ecr.Deny(accessKey)
			args := []string{"--assume-role-arn", otherRole}
			if tt.externalID != "" {
				args = append(args, "--assume-role-external-id", tt.externalID)
			}
			w.succeeds(w.run(args...), tt.source)
			requests := sts.Requests()
			if last := requests[len(requests)-1]; !strings.Contains(last.Header.Get("Authorization"), "Credential="+tt.identity.ID+"/") {
				t.Errorf("assumed by %s", last.Header.Get("Authorization"))
			}
		})
	}
}

const (
	otherRegion  = "ap-south-1"
	otherAccount = "210987654321"
	otherECRName = otherAccount + ".dkr.ecr." + otherRegion + ".amazonaws.com"
)

// otherECR adds ECR in otherRegion; both regions are behind a proxy, under their own host names.
func (w *world) otherECR() (*standin.ECR, *proxy) {
	w.t.Helper()
	other := &standin.ECR{Region: otherRegion, Account: otherAccount, Password: "ap-" + ecrPassword}
	other.Allow(accessKey)
	other.Allow(issued)
	p := w.proxied()
	p.serve(w, "api.ecr.eu-central-1.amazonaws.com", w.ecr)
	p.serve(w, "api.ecr.ap-south-1.amazonaws.com", other)
	return other, p
}

func TestRegistriesOfTwoRegionsShareOneSecret(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	other, p := w.otherECR()
	other.ExpiresAt = time.Now().Add(time.Hour).Truncate(time.Second)
	o := w.run("--registry", otherECRName, "--registry", ecrName)
	if want := " registries=" + ecrName + "," + otherECRName + " regions=ap-south-1,eu-central-1 "; o.code != exitOK || !strings.Contains(o.last(), want) {
		t.Fatalf("exit %d: %s", o.code, o.last())
	}
	entry := func(e *standin.ECR) string {
		return fmt.Sprintf(`{"username":"AWS","password":%q,"auth":%q}`, e.Password, e.Token())
	}
	want := fmt.Sprintf(`{"auths":{%q:%s,%q:%s}}`, ecrName, entry(w.ecr), otherECRName, entry(other))
	if got := string(w.secret().Data[".dockerconfigjson"]); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got, want := w.secret().Metadata.Annotations["ecr-refresher/expires-at"], other.ExpiresAt.UTC().Format(time.RFC3339); got != want {
		t.Errorf("expires at %s, want the earliest, %s", got, want)
	}
	if len(w.ecr.Requests()) != 1 || len(other.Requests()) != 1 || len(p.hosts()) != 2 {
		t.Errorf("%d and %d calls, to %q", len(w.ecr.Requests()), len(other.Requests()), p.hosts())
	}
}

func TestOneFailingRegionWritesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	other, _ := w.otherECR()
	other.Deny(accessKey)
	w.putOld()
	before := w.secret()
	o := w.run("--registry", ecrName, "--registry", otherECRName)
	if o.code != exitFailure || !strings.Contains(o.last(), `msg="getting an ECR token in ap-south-1: AccessDeniedException: `) {
		t.Errorf("exit %d: %s", o.code, o.last())
	}
	if !reflect.DeepEqual(w.secret(), before) || len(w.k8s.Requests()) > 0 {
		t.Errorf("%d requests to the API server", len(w.k8s.Requests()))
	}
}

func TestRegistryRegionWinsOverTheClusters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	sts := w.irsa()
	other, p := w.otherECR()
	p.serve(w, "sts.eu-central-1.amazonaws.com", sts) // STS is called where the cluster is
	sts.Issue = hop
	if o := w.run("--registry", otherECRName, "--assume-role-arn", otherRole); o.code != exitOK || !strings.Contains(o.last(), " regions=ap-south-1 ") {
		t.Fatalf("exit %d: %s", o.code, o.last())
	}
	if got, want := p.hosts(), []string{"api.ecr.ap-south-1.amazonaws.com", "sts.eu-central-1.amazonaws.com"}; !slices.Equal(got, want) {
		t.Errorf("hosts %q, want %q", got, want)
	}
	if got := signedRegion(sts.Requests()[1]) + " " + signedRegion(other.Requests()[0]); got != "eu-central-1 ap-south-1" {
		t.Errorf("signed for %s", got)
	}
}

func TestSTSIsInTheRegistrysRegionWhenNoOtherIsKnown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	sts := w.irsa()
	_, p := w.otherECR()
	p.serve(w, "sts.ap-south-1.amazonaws.com", sts)
	delete(w.env, "AWS_REGION")
	if o := w.run("--registry", otherECRName); o.code != exitOK {
		t.Errorf("exit %d, hosts %q: %s", o.code, p.hosts(), o.last())
	}
}

func TestRegionFlagWinsAndMustNotContradictTheRegistry(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, p := w.otherECR()
	if o := w.run("--region", otherRegion); o.code != exitOK || !strings.Contains(o.last(), " registries="+otherECRName+" regions=ap-south-1 ") {
		t.Errorf("exit %d: %s", o.code, o.last())
	}
	asked := len(p.asked)
	const want = `level=ERROR msg="invalid flag --region: ap-south-1 contradicts --registry ` + ecrName + `, which lies in eu-central-1" hint="see ecr-refresher --help"`
	if o := w.run("--region", otherRegion, "--registry", otherECRName, "--registry", ecrName); o.code != exitUsage || o.last() != want || len(p.asked) > asked {
		t.Errorf("exit %d\n got %s\nwant %s", o.code, o.last(), want)
	}
	if o := w.run("--region", otherRegion, "--registry", "proxy.example:5000"); o.code != exitOK || !strings.Contains(o.last(), " registries=proxy.example:5000 regions=ap-south-1 ") {
		t.Errorf("exit %d: %s", o.code, o.last())
	}
}

func TestWrongClockIsCorrected(t *testing.T) {
	t.Parallel()
	for name, off := range map[string]time.Duration{"an hour behind": time.Hour, "an hour ahead": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			sts := w.irsa()
			sts.Issue = hop
			w.ecr.Now = func() time.Time { return time.Now().Add(off) }
			sts.Now = w.ecr.Now
			w.succeeds(w.run("--assume-role-arn", otherRole), `"web identity (IRSA)"`)
		})
	}
}

// The hints as printed.
const (
	actionHint   = "allow the action ecr:GetAuthorizationToken on resource * to this identity"
	keyHint      = "AWS does not know this access key: is AWS_ACCESS_KEY_ID right, active, and of this region's partition? Temporary keys (ASIA...) need AWS_SESSION_TOKEN"
	issuedHint   = "AWS does not take the credentials that it issued: is the region enabled in the account, and of the role's partition? Is this node's clock right?"
	expiredHint  = "the credentials have expired: renew them, or use access keys without a session token"
	secretHint   = "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID, or was copied in part; a wrong clock on this node shows the same"
	clockHint    = "this node's clock is wrong: set it, AWS allows 5 minutes"
	issuerHint   = "the cluster's service-account issuer must be an IAM OIDC identity provider in the role's account, reachable by AWS and with the audience sts.amazonaws.com"
	trustHint    = "does the role " + webRole + " exist, and does its trust policy allow sts:AssumeRoleWithWebIdentity to this cluster's OIDC provider, for sub system:serviceaccount:NAMESPACE:SERVICEACCOUNT and aud sts.amazonaws.com?"
	jwtHint      = "the kubelet must rotate the token in DIR/web-identity-token (a projected volume), and this node's clock must be right"
	assumeHint   = "the identity must be allowed sts:AssumeRole on " + otherRole + ", and that role's trust policy must name it (and the external ID, if it asks for one: --assume-role-external-id)"
	agentHint    = "does an EKS Pod Identity association exist for this namespace and ServiceAccount, and does the eks-pod-identity-agent run on this node?"
	projectHint  = "the token must be projected into the pod and readable by its user (securityContext.fsGroup)"
	sourcesHint  = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (access keys), AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE (IRSA, from the ServiceAccount's annotation), or AWS_CONTAINER_CREDENTIALS_FULL_URI (EKS Pod Identity, from the association)"
	hopHint      = sourcesHint + "; on EC2, a pod needs the metadata option HttpPutResponseHopLimit to be 2 or more"
	roleHint     = "does the instance have an IAM role that EC2 may assume? Else " + sourcesHint
	proxyHint    = "check HTTPS_PROXY and NO_PROXY, and whether the proxy allows this host"
	bundleHint   = "if a proxy with a CA of its own is in the way, mount that CA and name its file in AWS_CA_BUNDLE; if the certificate is not valid now, look at this node's clock"
	regionHint   = "does the region exist (--region, AWS_REGION, --registry)? Else look at the pod's DNS"
	networkHint  = "can this pod reach AWS? Look for a firewall, a network policy, or a proxy to name in HTTPS_PROXY"
	portalHint   = "something other than AWS answers: look for a proxy, a captive portal or a wrong AWS_ENDPOINT_URL"
	notECRHint   = "this is not what ECR answers: is AWS_ENDPOINT_URL_ECR, or a proxy, in the way?"
	throttleHint = "AWS is throttling or unwell: the next run will try again"
	codeHint     = "look the code up in the AWS documentation of this call"
	redirectHint = "redirects are not followed, the credentials would go with them: is AWS_ENDPOINT_URL right, or does a captive portal answer?"
	unwellHint   = "AWS, or a proxy before it, is unwell: the next run will try again"
	deadlineHint = "find out what is slow, or raise --timeout"
)

// canonicalEcho is what AWS adds to a mismatch.
var canonicalEcho = "\n\nThe Canonical String for this request should have been\n'POST\n/\n\ncontent-type:application/x-amz-json-1.1\n" +
	"host:api.ecr.eu-central-1.amazonaws.com\nx-amz-security-token:" + awsSession + "\n'"

// What the messages begin with.
const (
	ecrCall        = "getting an ECR token in eu-central-1: "
	irsaCall       = "getting AWS credentials from web identity (IRSA) for " + webRole + ": "
	agentCall      = "getting AWS credentials from container (EKS Pod Identity, ECS) at ADDRESS: "
	metadataCall   = "getting AWS credentials from instance metadata: "
	assumeCall     = "assuming the role " + otherRole + ": "
	mismatch       = "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details."
	canonicalShown = " The Canonical String for this request should have been 'POST / content-type:application/x-amz-json-1.1 " +
		"host:api.ecr.eu-central-1.amazonaws.com x-amz-security-token:[redacted] '"
	notAuthorized = "User: arn:aws:iam::123456789012:user/puller is not authorized to perform: "
)

var assume = []string{"--assume-role-arn", otherRole}

// awsFailures are the ways in which AWS, or what lies between, fails a run: the message and hint of the last line.
var awsFailures = []struct {
	name      string
	arrange   func(w *world)
	args      []string
	msg, hint string
}{
	// ECR's own errors.
	{"access denied", func(w *world) { w.ecr.Deny(accessKey) }, nil,
		ecrCall + "AccessDeniedException: " + notAuthorized + "ecr:GetAuthorizationToken on resource: * because no identity-based policy allows the ecr:GetAuthorizationToken action (HTTP 400, request ID UUID)", actionHint},
	{"expired token", func(w *world) { w.ecr.Expire(accessKey) }, nil,
		ecrCall + "ExpiredTokenException: The security token included in the request is expired (HTTP 400, request ID UUID)", expiredHint},
	{"unknown access key", func(w *world) { w.env["AWS_ACCESS_KEY_ID"] = "AKIAUNKNOWN" }, nil,
		ecrCall + "UnrecognizedClientException: The security token included in the request is invalid. (HTTP 400, request ID UUID)", keyHint},
	{"missing session token", func(w *world) { delete(w.env, "AWS_SESSION_TOKEN") }, nil,
		ecrCall + "UnrecognizedClientException: The security token included in the request is invalid. (HTTP 400, request ID UUID)", keyHint},
	{"wrong secret key", func(w *world) { w.env["AWS_SECRET_ACCESS_KEY"] = "x" + awsSecret[1:] }, nil,
		ecrCall + "InvalidSignatureException: " + mismatch + " (HTTP 400, request ID UUID)", secretHint},
	{"signature mismatch that echoes the session token", func(w *world) {
		w.ecr.Intercept = ecrError(400, "InvalidSignatureException", mismatch+canonicalEcho)
	}, nil, ecrCall + "InvalidSignatureException: " + mismatch + canonicalShown + " (HTTP 400, request ID UUID)", secretHint},
	{"endless message", func(w *world) {
		w.ecr.Intercept = ecrError(400, "InvalidParameterException", strings.Repeat("x", 1<<20))
	}, nil,
		ecrCall + "InvalidParameterException: " + strings.Repeat("x", maxMessage-len("InvalidParameterException: ")) + "... (HTTP 400, request ID UUID)", codeHint},
	{"forged log line", func(w *world) {
		w.ecr.Intercept = ecrError(400, "InvalidParameterException", "a\ntime=now level=INFO msg=forged")
	}, nil,
		ecrCall + "InvalidParameterException: a time=now level=INFO msg=forged (HTTP 400, request ID UUID)", codeHint},
	{"clock that runs away", func(w *world) {
		w.env["AWS_MAX_ATTEMPTS"] = "2"
		n := 0
		w.ecr.Now = func() time.Time { n++; return time.Now().Add(time.Duration(n) * time.Hour) }
	}, nil, ecrCall + "InvalidSignatureException: Signature expired: TIME is now earlier than TIME (TIME - 5 min.) (HTTP 400, request ID UUID) (tried 2 times)", clockHint},
	{"throttled", func(w *world) { w.ecr.Intercept = ecrError(400, "ThrottlingException", "Rate exceeded") }, nil,
		ecrCall + "ThrottlingException: Rate exceeded (HTTP 400, request ID UUID)", throttleHint},
	{"ECR out of order", func(w *world) {
		w.env["AWS_MAX_ATTEMPTS"] = "2"
		w.ecr.Intercept = ecrError(500, "ServerException", "Internal error")
	}, nil, ecrCall + "ServerException: Internal error (HTTP 500, request ID UUID) (tried 2 times)", throttleHint},
	{"malformed answer", func(w *world) {
		w.ecr.Intercept = answer(200, "application/x-amz-json-1.1", `{"authorizationData":[]}`)
	}, nil, ecrCall + "the answer has no authorizationData", notECRHint},

	// Web identity.
	{"no OIDC provider", func(w *world) {
		w.irsa().Intercept = stsError(400, "InvalidIdentityToken", "No OpenIDConnect provider found in your account for https://oidc.example/id/1")
	}, nil, irsaCall + "InvalidIdentityToken: No OpenIDConnect provider found in your account for https://oidc.example/id/1 (HTTP 400, request ID UUID)", issuerHint},
	{"token that STS rejects and echoes", func(w *world) {
		w.irsa().Intercept = stsError(400, "InvalidIdentityToken", "The ID Token "+jwt+" is not valid")
	}, nil, irsaCall + "InvalidIdentityToken: The ID Token [redacted] is not valid (HTTP 400, request ID UUID)", issuerHint},
	{"issuer out of AWS's reach", func(w *world) {
		w.irsa().Intercept = stsError(400, "IDPCommunicationError", "Couldn't retrieve verification key from your identity provider")
	}, nil, irsaCall + "IDPCommunicationError: Couldn't retrieve verification key from your identity provider (HTTP 400, request ID UUID)", issuerHint},
	{"expired web identity", func(w *world) {
		w.irsa().Intercept = stsError(400, "ExpiredTokenException", "Token expired: current date/time 1767323045 must be before the expiration date/time 1767319445")
	}, nil, irsaCall + "ExpiredTokenException: Token expired: current date/time 1767323045 must be before the expiration date/time 1767319445 (HTTP 400, request ID UUID)", jwtHint},
	{"trust policy", func(w *world) { w.irsa().RoleArn = otherRole }, nil,
		irsaCall + "AccessDenied: Not authorized to perform sts:AssumeRoleWithWebIdentity (HTTP 403, request ID UUID)", trustHint},
	{"web identity without ECR rights", func(w *world) { w.irsa(); w.ecr.Deny(issued) }, nil,
		ecrCall + "AccessDeniedException: " + notAuthorized + "ecr:GetAuthorizationToken on resource: * because no identity-based policy allows the ecr:GetAuthorizationToken action (HTTP 400, request ID UUID)", actionHint},
	{"region that is not enabled", func(w *world) { w.irsa().Issue = hop }, nil,
		ecrCall + "UnrecognizedClientException: The security token included in the request is invalid. (HTTP 400, request ID UUID)", issuedHint},
	{"issued credentials that came expired", func(w *world) { w.irsa(); w.ecr.Expire(issued) }, nil,
		ecrCall + "ExpiredTokenException: The security token included in the request is expired (HTTP 400, request ID UUID)", issuedHint},
	{"missing web identity token", func(w *world) { w.irsa(); w.env["AWS_WEB_IDENTITY_TOKEN_FILE"] = w.dir + "/missing" }, nil,
		irsaCall + "reading the token: open DIR/missing: no such file or directory", projectHint},
	{"unreadable web identity token", func(w *world) { w.irsa(); w.env["AWS_WEB_IDENTITY_TOKEN_FILE"] = w.dir }, nil,
		irsaCall + "reading the token: read DIR: is a directory", projectHint},
	{"empty web identity token", func(w *world) { w.irsa(); w.file("web-identity-token", " \n") }, nil,
		irsaCall + "reading the token: DIR/web-identity-token does not hold a token on one line", projectHint},
	{"STS that issues no key", func(w *world) { w.irsa().Issue = standin.Key{} }, nil, irsaCall + "the answer holds no access key", portalHint},

	// A role in another account.
	{"role that may not be assumed", func(w *world) { w.sts().AssumeRoleArn = webRole }, assume,
		assumeCall + "AccessDenied: " + notAuthorized + "sts:AssumeRole on resource: " + otherRole + " (HTTP 403, request ID UUID)", assumeHint},
	{"missing external ID", func(w *world) { w.sts().ExternalID = "team-7" }, assume,
		assumeCall + "AccessDenied: " + notAuthorized + "sts:AssumeRole on resource: " + otherRole + " (HTTP 403, request ID UUID)", assumeHint},
	{"unknown access key at STS", func(w *world) { w.sts(); w.env["AWS_ACCESS_KEY_ID"] = "AKIAUNKNOWN" }, assume,
		assumeCall + "InvalidClientTokenId: The security token included in the request is invalid. (HTTP 403, request ID UUID)", keyHint},
	{"expired token at STS", func(w *world) { w.sts().Expire(accessKey) }, assume,
		assumeCall + "ExpiredToken: The security token included in the request is expired (HTTP 403, request ID UUID)", expiredHint},
	{"signature mismatch at STS", func(w *world) { w.sts(); w.env["AWS_SECRET_ACCESS_KEY"] = "x" + awsSecret[1:] }, assume,
		assumeCall + "SignatureDoesNotMatch: " + mismatch + " (HTTP 403, request ID UUID)", secretHint},
	{"clock of STS that runs away", func(w *world) {
		w.env["AWS_MAX_ATTEMPTS"] = "2"
		n := 0
		w.sts().Now = func() time.Time { n--; return time.Now().Add(time.Duration(n) * time.Hour) }
	}, assume, assumeCall + "SignatureDoesNotMatch: Signature not yet current: TIME is still later than TIME (TIME + 5 min.) (HTTP 403, request ID UUID) (tried 2 times)", clockHint},

	// EKS Pod Identity and ECS.
	{"no association", func(w *world) {
		w.podIdentity().Intercept = agentError(404, "ResourceNotFoundException", "No association found for service account refresher in namespace shop")
	}, nil, agentCall + "HTTP 404 Not Found: [UUID]: (ResourceNotFoundException): No association found for service account refresher in namespace shop, fault: client", agentHint},
	{"agent that rejects the token", func(w *world) { w.podIdentity().Token = "another" }, nil,
		agentCall + "HTTP 400 Bad Request: [UUID]: (InvalidTokenException): The token included in the request is invalid, fault: client", agentHint},
	{"agent without a token", func(w *world) { w.podIdentity(); delete(w.env, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE") }, nil,
		agentCall + "HTTP 400 Bad Request", agentHint},
	{"agent out of order", func(w *world) { w.podIdentity().Intercept = agentError(500, "InternalServerException", "down") }, nil,
		agentCall + "HTTP 500 Internal Server Error: [UUID]: (InternalServerException): down, fault: server (tried 3 times)", agentHint},
	{"agent that speaks JSON", func(w *world) {
		w.podIdentity().Intercept = answer(400, "application/json", `{"code":"AccessDeniedException","message":"not here"}`)
	}, nil, agentCall + "AccessDeniedException: not here (HTTP 400)", agentHint},
	{"agent that answers HTML", func(w *world) { w.podIdentity().Intercept = answer(404, "text/html", "<h1>"+jwt+"</h1>") }, nil,
		agentCall + "HTTP 404 Not Found", agentHint},
	{"agent that answers 200 with HTML", func(w *world) { w.podIdentity().Intercept = answer(200, "text/html", "<h1>"+jwt+"</h1>") }, nil,
		agentCall + "the answer is not AWS's, or was cut short", agentHint},
	{"agent that issues no key", func(w *world) { w.podIdentity().Intercept = answer(200, "application/json", "{}") }, nil,
		agentCall + "the answer holds no access key", agentHint},
	{"agent that answers null", func(w *world) { w.podIdentity().Intercept = answer(200, "application/json", "null") }, nil,
		agentCall + "the answer holds no access key", agentHint},
	{"agent that answers 400 with null", func(w *world) { w.podIdentity().Intercept = answer(400, "application/json", "null") }, nil,
		agentCall + "the answer holds no access key", agentHint},
	{"agent that redirects", func(w *world) {
		w.podIdentity().Intercept = redirect(w)
	}, nil, agentCall + "HTTP 302 Found", redirectHint},
	{"no agent", func(w *world) {
		w.podIdentity()
		w.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = "http://" + w.closed() + "/v1/credentials"
	}, nil, agentCall + "ADDRESS: dial tcp ADDRESS: connect: connection refused (tried 3 times)", agentHint},
	{"silent agent", func(w *world) {
		w.podIdentity()
		w.env["AWS_CONTAINER_CREDENTIALS_FULL_URI"] = "http://" + w.silent() + "/v1/credentials"
	}, []string{"--timeout=1s"}, agentCall + "the run's deadline of 1s (--timeout) has passed", deadlineHint},
	{"missing Pod Identity token", func(w *world) { w.podIdentity(); w.env["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"] = w.dir + "/missing" }, nil,
		agentCall + "reading the token: open DIR/missing: no such file or directory", projectHint},
	{"empty Pod Identity token", func(w *world) { w.podIdentity(); w.file("pod-identity-token", "\n") }, nil,
		agentCall + "reading the token: DIR/pod-identity-token does not hold a token on one line", projectHint},
	{"Pod Identity token on two lines", func(w *world) { w.podIdentity(); w.file("pod-identity-token", jwt+"\r\nX-Forged: yes") }, nil,
		agentCall + "reading the token: DIR/pod-identity-token does not hold a token on one line", projectHint},

	// Instance metadata.
	{"hop limit", func(w *world) { w.imds(); w.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = "http://" + w.silent() }, nil,
		metadataCall + "no other source is configured, and the instance metadata service does not answer within 3s", hopHint},
	{"no metadata service", func(w *world) { w.imds(); w.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = "http://" + w.closed() }, nil,
		metadataCall + "no other source is configured, and the instance metadata service gives no session token: Put 'http://ADDRESS/latest/api/token': dial tcp ADDRESS: connect: connection refused", hopHint},
	{"metadata service that is switched off", func(w *world) { w.imds().Intercept = answer(403, "text/html", "<h1>403 - Forbidden</h1>") }, nil,
		metadataCall + "no other source is configured, and the instance metadata service gives no session token: http response error StatusCode: 403, request to EC2 IMDS failed", hopHint},
	{"instance without a role", func(w *world) { w.imds().Role = "" }, nil,
		metadataCall + "HTTP 404 Not Found", roleHint},
	{"role that EC2 may not assume", func(w *world) {
		w.imds().Intercept = func(n int, rw http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, "/node-role") {
				return false
			}
			return answer(200, "text/plain", `{"Code":"AssumeRoleUnauthorizedAccess","Message":"EC2 cannot assume the role node-role."}`)(n, rw, r)
		}
	}, nil, metadataCall + "AssumeRoleUnauthorizedAccess: EC2 cannot assume the role node-role.", roleHint},

	// Between the pod and AWS.
	{"unknown region", func(w *world) { w.env["AWS_ENDPOINT_URL_ECR"] = "https://api.ecr.nowhere..example" }, nil, // which no resolver is asked for
		ecrCall + "api.ecr.nowhere..example: dial tcp: lookup api.ecr.nowhere..example: no such host", regionHint},
	{"unknown region behind a proxy", func(w *world) { w.proxied() }, []string{"--region", "xx-nowhere-1"},
		"getting an ECR token in xx-nowhere-1: api.ecr.xx-nowhere-1.amazonaws.com: the proxy refused with HTTP 502", proxyHint},
	{"no proxy", func(w *world) {
		w.proxied()
		w.env["HTTPS_PROXY"] = "http://me:" + url.QueryEscape(issuedSecret) + "@" + w.closed()
	}, nil,
		ecrCall + "api.ecr.eu-central-1.amazonaws.com: proxyconnect tcp: dial tcp ADDRESS: connect: connection refused", proxyHint},
	{"proxy that forbids", func(w *world) { w.proxied().refuse = 403 }, nil,
		ecrCall + "api.ecr.eu-central-1.amazonaws.com: the proxy refused with HTTP 403", proxyHint},
	{"proxy that wants a password", func(w *world) { w.irsa(); w.proxied().refuse = 407 }, nil,
		irsaCall + "sts.eu-central-1.amazonaws.com: the proxy refused with HTTP 407", proxyHint},
	{"nothing listens", func(w *world) { w.env["AWS_ENDPOINT_URL_ECR"] = "https://" + w.closed() }, nil,
		ecrCall + "ADDRESS: dial tcp ADDRESS: connect: connection refused", networkHint},
	{"silent endpoint", func(w *world) { w.env["AWS_ENDPOINT_URL_ECR"] = "https://" + w.silent() }, []string{"--timeout=1s"},
		ecrCall + "the run's deadline of 1s (--timeout) has passed", deadlineHint},
	{"untrusted certificate", func(w *world) { delete(w.env, "AWS_CA_BUNDLE") }, nil,
		ecrCall + "ADDRESS: tls: failed to verify certificate: x509: certificate signed by unknown authority", bundleHint},
	{"untrusted certificate at STS", func(w *world) { w.irsa(); delete(w.env, "AWS_CA_BUNDLE") }, nil,
		irsaCall + "ADDRESS: tls: failed to verify certificate: x509: certificate signed by unknown authority", bundleHint},
	{"certificate of another host", func(w *world) {
		w.env["AWS_ENDPOINT_URL_ECR"] = w.startTLSAs(w.ecr, standin.CertOptions{Hosts: []string{"127.0.0.2"}}).URL
	}, nil, ecrCall + "ADDRESS: tls: failed to verify certificate: x509: certificate is valid for 127.0.0.2, not 127.0.0.1", bundleHint},
	{"plain HTTP behind https", func(w *world) {
		w.env["AWS_ENDPOINT_URL_ECR"] = strings.Replace(w.startHTTP(w.ecr), "http:", "https:", 1)
	}, nil,
		ecrCall + "ADDRESS: http: server gave HTTP response to HTTPS client", portalHint},
	{"HTML with 502", func(w *world) { w.ecr.Intercept = answer(502, "text/html", "<h1>Bad Gateway "+awsSession+"</h1>") }, nil,
		ecrCall + "HTTP 502 Bad Gateway, and the body is no AWS error", unwellHint},
	{"HTML with 502 from STS", func(w *world) { w.irsa().Intercept = answer(502, "text/html", "<h1>Bad Gateway "+jwt+"</h1>") }, nil,
		irsaCall + "HTTP 502 Bad Gateway, and the body is no AWS error", unwellHint},
	{"captive portal", func(w *world) { w.ecr.Intercept = answer(200, "text/html", "<h1>Log in "+awsSession+"</h1>") }, nil,
		ecrCall + "the answer is not AWS's, or was cut short", portalHint},
	{"captive portal before STS", func(w *world) { w.irsa().Intercept = answer(200, "text/html", "<br>Log in "+jwt) }, nil,
		irsaCall + "the answer is not AWS's, or was cut short", portalHint},
	{"redirect", func(w *world) { w.ecr.Intercept = redirect(w) }, nil, ecrCall + "HTTP 302 Found, and the body is no AWS error", redirectHint},
	{"redirect from STS", func(w *world) { w.irsa().Intercept = redirect(w) }, nil, irsaCall + "HTTP 302 Found, and the body is no AWS error", redirectHint},
}

// redirect is an Intercept that sends the client to another host, which must not see it.
func redirect(w *world) standin.Intercept {
	other := w.startTLS(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		w.t.Errorf("the redirect was followed, with X-Amz-Security-Token %q", r.Header.Get("X-Amz-Security-Token"))
	})).URL
	return func(_ int, rw http.ResponseWriter, r *http.Request) bool {
		http.Redirect(rw, r, other, http.StatusFound)
		return true
	}
}

func TestFailuresOfAWSNameTheirCure(t *testing.T) {
	t.Parallel()
	for _, tt := range awsFailures {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.env["AWS_MAX_ATTEMPTS"] = "1"
			w.putOld()
			before := w.secret()
			tt.arrange(w)
			o := w.run(tt.args...)
			if want := fmt.Sprintf("level=ERROR msg=%q hint=%q", tt.msg, tt.hint); o.code != exitFailure || o.stdout != "" || w.steady(o) != want {
				t.Errorf("exit %d\n got %s\nwant %s", o.code, w.steady(o), want)
			}
			if n := strings.Count(o.stderr, "\n"); n != 1 {
				t.Errorf("%d lines on stderr, want 1:\n%s", n, o.stderr)
			}
			if !reflect.DeepEqual(w.secret(), before) || len(w.k8s.Requests()) > 0 {
				t.Errorf("%d requests to the API server, Secret %+v", len(w.k8s.Requests()), w.secret())
			}
			if limit := 10 * time.Second; o.took > limit {
				t.Errorf("took %v, more than %v", o.took, limit)
			}
		})
	}
}
