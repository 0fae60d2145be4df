package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

const (
	metadataTimeout = 3 * time.Second // outside EC2 nobody answers there: the run must say so soon
	maxSecretSize   = 1 << 20         // bytes of all data in a Secret (k8s.io/api/core/v1 MaxSecretSize)
)

// result is what a successful run did.
type result struct {
	registries, regions []string
	expiresAt           time.Time // the earliest of the tokens
	created             bool
}

func (r *result) verb(dryRun bool) string {
	verb := "patched"
	if r.created {
		verb = "created"
	}
	if dryRun {
		verb = "would be " + verb + " (dry run)"
	}
	return verb
}

// refresh is one run: credentials, one token per region, docker config, Secret. It writes nothing unless all tokens
// are there.
func refresh(ctx context.Context, s *settings, redact *redactor, log *slog.Logger) (*result, error) {
	client := newKubeClient(ctx, s, redact, log)
	creds, err := s.aws.credentials(ctx, redact, log)
	if err != nil {
		return nil, err
	}
	tokens, err := s.aws.tokens(ctx, creds, s.regions, redact)
	if err != nil {
		return nil, err
	}
	done := &result{regions: slices.Sorted(maps.Keys(s.regions))}
	auths := map[string]dockerAuth{}
	for _, t := range tokens {
		for _, host := range t.hosts {
			auths[host] = t.auth
		}
		if done.expiresAt.IsZero() || t.expiresAt.Before(done.expiresAt) {
			done.expiresAt = t.expiresAt
		}
	}
	done.registries = slices.Sorted(maps.Keys(auths))
	if done.expiresAt.Before(time.Now()) {
		log.Warn("the token's expiry lies in the past: is this node's clock right?", "expires", done.expiresAt.UTC().Format(time.RFC3339))
	}
	config, err := dockerConfig(auths)
	if err != nil {
		return nil, err
	}
	redact.add(string(config))
	done.created, err = client.writeSecret(ctx, secretContent{
		dockerConfig: config,
		annotations: map[string]string{
			"ecr-refresher/expires-at":   done.expiresAt.UTC().Format(time.RFC3339),
			"ecr-refresher/refreshed-at": time.Now().UTC().Format(time.RFC3339),
		},
	})
	return done, err
}

// dockerAuth is an entry of a docker config file, with all three fields: some readers know only auth, some only the
// others.
type dockerAuth struct {
	Username string `json:"username"`
	Password string `json:"password"`
	Auth     string `json:"auth"` // base64 of username:password
}

// dockerConfig returns the content of .dockerconfigjson. Equal input gives equal bytes: encoding/json sorts the hosts.
func dockerConfig(auths map[string]dockerAuth) ([]byte, error) {
	b, err := json.Marshal(map[string]any{"auths": auths})
	if err == nil && len(b) > maxSecretSize {
		err = withHint(fmt.Errorf("the docker config has %d bytes, more than the %d that a Secret can hold", len(b), maxSecretSize),
			"ECR's token is usually below 5 kB: is AWS_ENDPOINT_URL_ECR right? Else give each Secret fewer registries")
	}
	return b, err
}

// ecrToken is the authorization token of one region.
type ecrToken struct {
	hosts     []string // that get it
	auth      dockerAuth
	expiresAt time.Time
}

// tokens gets the tokens of all regions at the same time. Either all succeed or the call fails.
func (a *awsSettings) tokens(ctx context.Context, creds aws.CredentialsProvider, regions map[string][]string, redact *redactor) ([]ecrToken, error) {
	names := slices.Sorted(maps.Keys(regions))
	tokens := make([]ecrToken, len(names))
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, region := range names {
		wg.Go(func() { tokens[i], errs[i] = a.token(ctx, creds, region, regions[region], redact) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return tokens, nil
}

func (a *awsSettings) token(ctx context.Context, creds aws.CredentialsProvider, region string, hosts []string, redact *redactor) (ecrToken, error) {
	client := ecr.New(ecr.Options{
		Region:           region,
		Credentials:      creds,
		BaseEndpoint:     a.ecrEndpoint,
		EndpointOptions:  ecr.EndpointResolverOptions{UseFIPSEndpoint: a.fips, UseDualStackEndpoint: a.dualStack},
		HTTPClient:       a.httpClient(),
		RetryMaxAttempts: a.maxAttempts,
		AppID:            "ecr-refresher",
	})
	doing := "getting an ECR token in " + region
	out, err := client.GetAuthorizationToken(ctx, &ecr.GetAuthorizationTokenInput{})
	if err != nil {
		return ecrToken{}, a.explain(ctx, doing, err, redact)
	}
	token, err := parseToken(out, hosts, redact)
	if err != nil && ctx.Err() != nil { // the SDK may take an answer that the deadline cut for an empty one
		return ecrToken{}, a.explain(ctx, doing, err, redact)
	}
	if err != nil {
		return ecrToken{}, withHint(fmt.Errorf("%s: %w", doing, err), "this is not what ECR answers: is AWS_ENDPOINT_URL_ECR, or a proxy, in the way?")
	}
	return token, nil
}

// parseToken checks every part of ECR's answer, for a token that no registry takes is worse than none. The errors never
// hold the parts.
func parseToken(out *ecr.GetAuthorizationTokenOutput, hosts []string, redact *redactor) (ecrToken, error) {
	if len(out.AuthorizationData) == 0 {
		return ecrToken{}, errors.New("the answer has no authorizationData")
	}
	data := out.AuthorizationData[0] // there is one, as no registryIds were asked for
	auth, err := decodeToken(aws.ToString(data.AuthorizationToken), redact)
	if err != nil {
		return ecrToken{}, err
	}
	if data.ExpiresAt == nil {
		return ecrToken{}, errors.New("the answer has no expiresAt")
	}
	if len(hosts) == 0 {
		host := strings.TrimPrefix(aws.ToString(data.ProxyEndpoint), "https://")
		if host == "" {
			return ecrToken{}, errors.New("the answer has no proxyEndpoint, so the registry is not known")
		}
		if err := checkRegistryHost(host); err != nil {
			return ecrToken{}, errors.New("the answer's proxyEndpoint is not a registry host")
		}
		hosts = []string{host}
	}
	return ecrToken{hosts: hosts, auth: auth, expiresAt: *data.ExpiresAt}, nil
}

// decodeToken splits an authorization token, which is base64 of user:password.
func decodeToken(token string, redact *redactor) (dockerAuth, error) {
	if token == "" {
		return dockerAuth{}, errors.New("the answer has no authorizationToken")
	}
	redact.add(token)
	decoded, err := base64.StdEncoding.DecodeString(token)
	if err != nil {
		return dockerAuth{}, errors.New("the authorizationToken is not base64")
	}
	user, password, found := strings.Cut(string(decoded), ":")
	redact.add(string(decoded), password)
	switch {
	case !found:
		return dockerAuth{}, errors.New("the authorizationToken has no colon between user and password")
	case user == "":
		return dockerAuth{}, errors.New("the authorizationToken has an empty user")
	case password == "":
		return dockerAuth{}, errors.New("the authorizationToken has an empty password")
	case strings.ContainsFunc(string(decoded), func(r rune) bool { return r <= ' ' || r > '~' }):
		return dockerAuth{}, errors.New("the authorizationToken holds characters other than printable ASCII")
	}
	return dockerAuth{Username: user, Password: password, Auth: base64.StdEncoding.EncodeToString(decoded)}, nil
}

// checkRegistryHost accepts a host name, with a port or without.
func checkRegistryHost(host string) error {
	if strings.Contains(host, "/") {
		return errors.New("is more than a host: leave out scheme and path")
	}
	name, port, hasPort := strings.Cut(host, ":")
	if hasPort && !isPort(port) {
		return errors.New("has no valid port after its ':'")
	}
	if i := strings.IndexFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.'
	}); i >= 0 {
		r := []rune(name[i:])[0]
		return fmt.Errorf("has the character %q (%U), which no registry host has", r, r)
	}
	if !isDNSName(name) {
		return errors.New("is not a host name")
	}
	return nil
}

// partition is one of AWS's separate groups of regions, each with DNS suffixes of its own.
// https://docs.aws.amazon.com/general/latest/gr/ecr.html, the partitions table of the AWS SDKs and, for dual-stack, the
// registry patterns of https://github.com/aws/amazon-ecs-agent
type partition struct {
	regions         []string // how the names of its regions begin; a word, a hyphen and a number follow
	suffix          string   // of <account>.dkr.ecr.<region>.<suffix>
	dualStackSuffix string   // of <account>.dkr-ecr.<region>.<suffix>
	fips            bool     // whether dkr.ecr-fips and dkr-ecr-fips exist
}

var partitions = []partition{
	{[]string{"us-", "eu-", "ap-", "sa-", "ca-", "me-", "af-", "il-", "mx-"}, "amazonaws.com", "on.aws", true},
	{[]string{"us-gov-"}, "amazonaws.com", "on.aws", true},
	{[]string{"cn-"}, "amazonaws.com.cn", "on.amazonwebservices.com.cn", false},
	{[]string{"eusc-de-"}, "amazonaws.eu", "on.amazonwebservices.eu", false},
	{[]string{"us-iso-"}, "c2s.ic.gov", "on.aws.ic.gov", true},
	{[]string{"us-isob-"}, "sc2s.sgov.gov", "on.aws.scloud", true},
	{[]string{"eu-isoe-"}, "cloud.adc-e.uk", "on.cloud-aws.adc-e.uk", true},
	{[]string{"us-isof-"}, "csp.hci.ic.gov", "on.aws.hci.ic.gov", true},
}

// has reports whether region is one of the partition's, or a later one of the same form: us-gov- and west-1.
func (p partition) has(region string) bool {
	return slices.ContainsFunc(p.regions, func(prefix string) bool {
		rest, ok := strings.CutPrefix(region, prefix)
		word, number, _ := strings.Cut(rest, "-")
		return ok && word != "" && strings.Trim(word, "abcdefghijklmnopqrstuvwxyz") == "" && isDigits(number)
	})
}

func isDigits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// registryRegion returns the region of an ECR registry from its host, and "" for a host that is not ECR's: a VPC
// endpoint or a pull-through proxy. A host that looks like ECR's but cannot exist is an error, since a typo there shows
// only when a pull fails.
func registryRegion(host string) (string, error) {
	if err := checkRegistryHost(host); err != nil {
		return "", err
	}
	if host == "public.ecr.aws" || host == "ecr-public.aws.com" {
		return "", errors.New("is Amazon ECR Public, which has another API and lets everybody pull: it needs no Secret")
	}
	// <account>.dkr.ecr.<region>.<suffix> has one label more than the dual-stack <account>.dkr-ecr.<region>.<suffix>.
	labels := strings.Split(strings.Replace(host, ".dkr.ecr", ".dkr/ecr", 1), ".")
	kind := ""
	if len(labels) > 3 {
		kind = strings.Replace(labels[1], "/", ".", 1)
	}
	if !isDigits(labels[0]) || !slices.Contains([]string{"dkr.ecr", "dkr.ecr-fips", "dkr-ecr", "dkr-ecr-fips"}, kind) {
		return "", checkOtherHost(host)
	}
	account, region, suffix := labels[0], labels[2], strings.Join(labels[3:], ".")
	if len(account) != 12 {
		return "", fmt.Errorf("must begin with an account ID of 12 digits, not of %d", len(account))
	}
	i := slices.IndexFunc(partitions, func(p partition) bool { return p.has(region) })
	if i < 0 {
		return "", fmt.Errorf("has no AWS region in the place of %q", region)
	}
	p := partitions[i]
	want := p.suffix
	if strings.HasPrefix(kind, "dkr-ecr") {
		want = p.dualStackSuffix
	}
	switch {
	case suffix != want:
		return "", fmt.Errorf("must end in %s for %s in region %s", want, kind, region)
	case strings.HasSuffix(kind, "-fips") && !p.fips:
		return "", fmt.Errorf("has the FIPS form, which region %s does not have", region)
	}
	return region, nil
}

// checkOtherHost rejects a host of AWS that names ECR but is no registry, such as the API's api.ecr.<region>; a VPC
// endpoint or a load balancer in front of a proxy passes.
func checkOtherHost(host string) error {
	labels := strings.Split(host, ".")
	aws := slices.ContainsFunc(partitions, func(p partition) bool {
		return strings.HasSuffix(host, "."+p.suffix) || strings.HasSuffix(host, "."+p.dualStackSuffix)
	})
	ecr := slices.ContainsFunc(labels, func(l string) bool { return strings.HasPrefix(l, "ecr") || strings.HasPrefix(l, "dkr") })
	if aws && ecr && !slices.Contains(labels, "vpce") {
		return errors.New("is a host of AWS but no registry: it must be <account>.dkr.ecr.<region>.amazonaws.com")
	}
	return nil
}

// credentialSource says where the run's AWS credentials come from.
type credentialSource int

// In the order in which the AWS SDKs look for them.
// https://docs.aws.amazon.com/sdkref/latest/guide/standardized-credentials.html
const (
	accessKeys credentialSource = iota
	webIdentity
	container
	instanceMetadata
)

func (s credentialSource) String() string {
	return [...]string{"access keys", "web identity (IRSA)", "container (EKS Pod Identity, ECS)", "instance metadata"}[s]
}

// sourceHelp lists what selects each source.
const sourceHelp = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (access keys), AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE (IRSA, from the ServiceAccount's annotation), or AWS_CONTAINER_CREDENTIALS_FULL_URI (EKS Pod Identity, from the association)"

// awsSettings is what the environment says of AWS. The SDK reads none of it by itself: only its config module would,
// which this program does without.
type awsSettings struct {
	source  credentialSource
	ignored []credentialSource // configured as well

	accessKeyID, secretAccessKey, sessionToken       string
	roleARN, webIdentityTokenFile, roleSessionName   string
	containerURL, containerToken, containerTokenFile string
	metadataEndpoint                                 string // empty: the SDK's
	assumeRoleARN, assumeRoleExternalID              string

	stsRegion                string
	ecrEndpoint, stsEndpoint *string // nil: AWS's
	fips                     aws.FIPSEndpointState
	dualStack                aws.DualStackEndpointState
	maxAttempts              int            // of one AWS call; 0: the SDK's 3
	roots                    *x509.CertPool // that AWS's certificates must lead to
}

// parse fills a from the environment. It chooses exactly one source: when that one fails, the run fails, and does not
// fall back to the node's role.
func (a *awsSettings) parse(getenv func(string) string, redact *redactor, invalid func(name, format string, a ...any)) {
	a.accessKeyID, a.secretAccessKey, a.sessionToken = getenv("AWS_ACCESS_KEY_ID"), getenv("AWS_SECRET_ACCESS_KEY"), getenv("AWS_SESSION_TOKEN")
	a.roleARN, a.webIdentityTokenFile, a.roleSessionName = getenv("AWS_ROLE_ARN"), getenv("AWS_WEB_IDENTITY_TOKEN_FILE"), getenv("AWS_ROLE_SESSION_NAME")
	a.containerToken, a.containerTokenFile = getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN"), getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
	a.metadataEndpoint = getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN"} {
		if v := getenv(name); v != strings.TrimSpace(v) || strings.ContainsAny(v, "\r\n") {
			invalid("environment "+name, "it holds a line break, or white space at an end: was the Secret made with echo instead of printf?")
		}
	}
	if a.roleSessionName != "" && !isRoleSessionName(a.roleSessionName) {
		invalid("environment AWS_ROLE_SESSION_NAME", "%q is not 2 to 64 letters, digits and _+=,.@-", a.roleSessionName)
	}

	var configured []credentialSource
	pair := func(source credentialSource, name1, value1, name2, value2 string) {
		switch {
		case value1 == "" && value2 == "":
			return
		case value1 == "":
			invalid("environment", "%s is set, but %s is not", name2, name1)
		case value2 == "":
			invalid("environment", "%s is set, but %s is not", name1, name2)
		}
		configured = append(configured, source)
	}
	pair(accessKeys, "AWS_ACCESS_KEY_ID", a.accessKeyID, "AWS_SECRET_ACCESS_KEY", a.secretAccessKey)
	pair(webIdentity, "AWS_ROLE_ARN", a.roleARN, "AWS_WEB_IDENTITY_TOKEN_FILE", a.webIdentityTokenFile)
	if relative, full := getenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"), getenv("AWS_CONTAINER_CREDENTIALS_FULL_URI"); relative != "" || full != "" {
		configured = append(configured, container)
		name := "AWS_CONTAINER_CREDENTIALS_FULL_URI"
		a.containerURL = full
		if relative != "" {
			name = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"
			a.containerURL = "http://169.254.170.2" + relative
		}
		if relative != "" && !strings.HasPrefix(relative, "/") { // "@example.com/" would make another host of it
			invalid("environment "+name, "%q does not begin with a slash", relative)
		} else if err := checkContainerURL(a.containerURL); err != nil {
			invalid("environment "+name, "%v", err)
		}
	}
	if len(configured) > 0 {
		a.source, a.ignored = configured[0], configured[1:]
	} else {
		a.source = instanceMetadata
		if strings.EqualFold(getenv("AWS_EC2_METADATA_DISABLED"), "true") {
			invalid("environment", "no AWS credentials: %s; the instance's role is switched off by AWS_EC2_METADATA_DISABLED", sourceHelp)
		}
	}
	if a.metadataEndpoint != "" && !isHTTPURL(a.metadataEndpoint) {
		invalid("environment AWS_EC2_METADATA_SERVICE_ENDPOINT", "%q is not an http or https URL", a.metadataEndpoint)
	}
	if profile := getenv("AWS_PROFILE"); profile != "" {
		invalid("environment AWS_PROFILE", "profiles and shared files are not read; %s", sourceHelp)
	}
	for _, arn := range []struct{ name, value string }{{"environment AWS_ROLE_ARN", a.roleARN}, {"flag --assume-role-arn", a.assumeRoleARN}} {
		if arn.value != "" && !isRoleARN(arn.value) {
			invalid(arn.name, "%q is not the ARN of a role, such as arn:aws:iam::123456789012:role/NAME", arn.value)
		}
	}
	if a.assumeRoleExternalID != "" && a.assumeRoleARN == "" {
		invalid("flag --assume-role-external-id", "it is of use with --assume-role-arn only")
	}

	endpoint := func(name string) *string {
		for _, n := range []string{name, "AWS_ENDPOINT_URL"} {
			if v := getenv(n); v != "" {
				if !isHTTPURL(v) {
					invalid("environment "+n, "%q is not an http or https URL", v)
				}
				return &v
			}
		}
		return nil
	}
	a.ecrEndpoint, a.stsEndpoint = endpoint("AWS_ENDPOINT_URL_ECR"), endpoint("AWS_ENDPOINT_URL_STS")
	custom := a.ecrEndpoint != nil || a.stsEndpoint != nil && (a.source == webIdentity || a.assumeRoleARN != "")
	boolean := func(name string) bool {
		v := getenv(name)
		if v != "" && !strings.EqualFold(v, "true") && !strings.EqualFold(v, "false") {
			invalid("environment "+name, "%q is neither true nor false", v)
		}
		on := strings.EqualFold(v, "true")
		if on && custom { // the SDK would refuse the call
			invalid("environment "+name, "it chooses an endpoint, and so does AWS_ENDPOINT_URL: unset one")
		}
		return on
	}
	if boolean("AWS_USE_FIPS_ENDPOINT") {
		a.fips = aws.FIPSEndpointStateEnabled
	}
	if boolean("AWS_USE_DUALSTACK_ENDPOINT") {
		a.dualStack = aws.DualStackEndpointStateEnabled
	}
	if v := getenv("AWS_MAX_ATTEMPTS"); v != "" {
		var err error
		if a.maxAttempts, err = strconv.Atoi(v); err != nil || a.maxAttempts < 1 {
			invalid("environment AWS_MAX_ATTEMPTS", "%q is not a whole number above zero", v)
		}
	}
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} { // net/http reads them
		v := getenv(name)
		if !strings.Contains(v, "://") {
			v = "http://" + v
		}
		u, err := url.Parse(v)
		if err != nil { // which quotes the value, and so perhaps a password
			invalid("environment "+name, "it is not a URL")
		} else if password, ok := u.User.Password(); ok {
			redact.add(password)
		}
	}
	if path := getenv("AWS_CA_BUNDLE"); path == "" {
		a.roots = publicRoots()
	} else {
		a.roots = x509.NewCertPool()
		if pem, err := os.ReadFile(path); err != nil {
			invalid("environment AWS_CA_BUNDLE", "%v", err)
		} else if !a.roots.AppendCertsFromPEM(pem) {
			invalid("environment AWS_CA_BUNDLE", "%s holds no certificate", path)
		}
	}
}

// isRoleARN reports whether s has the form arn:<partition>:iam::<12 digits>:role/<path and name>.
func isRoleARN(s string) bool {
	parts := strings.SplitN(s, ":", 6)
	return len(parts) == 6 && parts[0] == "arn" && strings.HasPrefix(parts[1], "aws") && parts[2] == "iam" && parts[3] == "" &&
		len(parts[4]) == 12 && isDigits(parts[4]) && strings.HasPrefix(parts[5], "role/") && len(parts[5]) > len("role/") &&
		!strings.ContainsFunc(parts[5], func(r rune) bool { return r <= ' ' || r > '~' })
}

// isRoleSessionName checks the form that https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html gives.
func isRoleSessionName(s string) bool {
	return len(s) >= 2 && len(s) <= 64 && !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("_+=,.@-", r)
	})
}

// publicRoots returns the system's CAs, which SSL_CERT_FILE replaces, and in an image without any those in the binary.
// It does what importing x509roots/fallback does, but not in runs that have AWS_CA_BUNDLE: parsing them takes 2 ms.
func publicRoots() *x509.CertPool {
	if system, err := x509.SystemCertPool(); err == nil && !system.Equal(x509.NewCertPool()) {
		return system
	}
	roots := x509.NewCertPool()
	for root := range bundle.Roots() {
		cert, err := x509.ParseCertificate(root.Certificate)
		switch {
		case err != nil: // one that this Go refuses is not trusted
		case root.Constraint != nil:
			roots.AddCertWithConstraint(cert, root.Constraint)
		default:
			roots.AddCert(cert)
		}
	}
	return roots
}

func isHTTPURL(s string) bool {
	u, err := url.Parse(s)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != ""
}

// checkContainerURL allows any https URL, and plain http only to where the agents of EKS and ECS listen: otherwise the
// authorization token would go in clear to whatever host the variable names. The rule is that of the SDKs' config
// modules. https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html
func checkContainerURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.User != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https" {
		return errors.New("it is not an http or https URL without a user") // which may hold a password
	}
	if u.Scheme == "https" {
		return nil
	}
	addr, err := netip.ParseAddr(u.Hostname())
	switch {
	case u.Hostname() == "localhost":
		return nil
	case err == nil && addr.Zone() == "" && (addr.IsLoopback() || slices.Contains(agentAddrs, addr)):
		return nil
	}
	return fmt.Errorf("it is plain http to %q, a host other than loopback, 169.254.170.2, 169.254.170.23 and [fd00:ec2::23]: use https", u.Hostname())
}

// agentAddrs are where ECS and the EKS Pod Identity agent (IPv4, IPv6) listen.
var agentAddrs = []netip.Addr{
	netip.MustParseAddr("169.254.170.2"),
	netip.MustParseAddr("169.254.170.23"),
	netip.MustParseAddr("fd00:ec2::23"),
}

// httpClient returns the client for ECR and STS. It honours HTTPS_PROXY and NO_PROXY. The SDK's own has no timeout.
func (a *awsSettings) httpClient() *http.Client {
	return boundedClient(attemptTimeout, &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSHandshakeTimeout: tlsTimeout,
		TLSClientConfig:     &tls.Config{RootCAs: a.roots, MinVersion: tls.VersionTLS12},

		MaxResponseHeaderBytes: maxHeader,

		OnProxyConnectResponse: checkProxyAnswer,
	})
}

// linkLocalClient returns the client for metadata service and agents, which are on this very host: never through a
// proxy.
func (a *awsSettings) linkLocalClient() *http.Client {
	return boundedClient(dialTimeout, &http.Transport{
		DialContext:     (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSClientConfig: &tls.Config{RootCAs: a.roots, MinVersion: tls.VersionTLS12},

		MaxResponseHeaderBytes: maxHeader,
	})
}

// credentials retrieves credentials from the one source, and exchanges them for the role of --assume-role-arn.
func (a *awsSettings) credentials(ctx context.Context, redact *redactor, log *slog.Logger) (aws.CredentialsProvider, error) {
	for _, ignored := range a.ignored {
		log.Warn("more than one source of AWS credentials is configured", "used", a.source.String(), "ignored", ignored.String())
	}
	doing := "getting AWS credentials from " + a.source.String()
	retrieveCtx := ctx
	var provider aws.CredentialsProvider
	switch a.source {
	case accessKeys:
		provider = credentials.NewStaticCredentialsProvider(a.accessKeyID, a.secretAccessKey, a.sessionToken)
	case webIdentity:
		doing += " for " + a.roleARN
		provider = stscreds.NewWebIdentityRoleProvider(a.stsClient(aws.AnonymousCredentials{}), a.roleARN, tokenFile{a.webIdentityTokenFile, redact},
			func(o *stscreds.WebIdentityRoleOptions) {
				o.RoleSessionName = cmp.Or(a.roleSessionName, "ecr-refresher")
			})
	case container:
		u, _ := url.Parse(a.containerURL) // checkContainerURL did already
		doing += " at " + u.Host          // the path may hold an ID that is enough to get them
		token := a.containerToken
		if a.containerTokenFile != "" {
			var err error
			if token, err = (tokenFile{a.containerTokenFile, redact}).read(); err != nil {
				return nil, a.explain(ctx, doing, err, redact)
			}
		}
		provider = endpointcreds.New(a.containerURL, func(o *endpointcreds.Options) {
			o.HTTPClient = a.linkLocalClient()
			o.AuthorizationToken = token
		})
	case instanceMetadata:
		var cancel context.CancelFunc
		retrieveCtx, cancel = context.WithTimeoutCause(ctx, metadataTimeout, errNoMetadata)
		defer cancel()
		provider = ec2rolecreds.New(func(o *ec2rolecreds.Options) {
			o.Client = imds.New(imds.Options{
				Endpoint:          a.metadataEndpoint,
				ClientEnableState: imds.ClientEnabled,
				EnableFallback:    aws.FalseTernary, // IMDSv2 only
				HTTPClient:        a.linkLocalClient(),
			})
		})
	}
	provider, err := retrieve(retrieveCtx, provider, redact)
	if err != nil {
		return nil, a.explain(retrieveCtx, doing, err, redact)
	}
	if a.assumeRoleARN == "" {
		return provider, nil
	}
	provider, err = retrieve(ctx, stscreds.NewAssumeRoleProvider(a.stsClient(provider), a.assumeRoleARN, func(o *stscreds.AssumeRoleOptions) {
		o.RoleSessionName = cmp.Or(a.roleSessionName, "ecr-refresher")
		if a.assumeRoleExternalID != "" {
			o.ExternalID = &a.assumeRoleExternalID
		}
	}), redact)
	if err != nil {
		return nil, a.explain(ctx, "assuming the role "+a.assumeRoleARN, err, redact)
	}
	return provider, nil
}

// retrieve gets the credentials once, and makes their secrets known before they can appear anywhere.
func retrieve(ctx context.Context, provider aws.CredentialsProvider, redact *redactor) (_ aws.CredentialsProvider, err error) {
	defer func() {
		if recover() != nil { // endpointcreds follows a nil pointer when the answer is the JSON null
			err = errNoKey
		}
	}()
	creds, err := provider.Retrieve(ctx)
	if err != nil {
		return nil, err
	}
	redact.add(creds.SecretAccessKey, creds.SessionToken)
	if !creds.HasKeys() {
		return nil, errNoKey
	}
	return credentials.StaticCredentialsProvider{Value: creds}, nil
}

var errNoKey = errors.New("the answer holds no access key")

func (a *awsSettings) stsClient(creds aws.CredentialsProvider) *sts.Client {
	return sts.New(sts.Options{
		Region:           a.stsRegion,
		Credentials:      creds,
		BaseEndpoint:     a.stsEndpoint,
		EndpointOptions:  sts.EndpointResolverOptions{UseFIPSEndpoint: a.fips, UseDualStackEndpoint: a.dualStack},
		HTTPClient:       a.httpClient(),
		RetryMaxAttempts: a.maxAttempts,
		AppID:            "ecr-refresher",
	})
}

// tokenFile is a projected token, read at each call because the kubelet rotates it.
type tokenFile struct {
	path   string
	redact *redactor
}

func (f tokenFile) read() (string, error) {
	b, err := os.ReadFile(f.path)
	if err != nil {
		return "", &tokenFileError{err}
	}
	token := strings.TrimSpace(string(b))
	f.redact.add(token)
	if token == "" || strings.ContainsAny(token, "\r\n") { // it becomes a header
		return "", &tokenFileError{fmt.Errorf("%s does not hold a token on one line", f.path)}
	}
	return token, nil
}

// GetIdentityToken implements stscreds.IdentityTokenRetriever.
func (f tokenFile) GetIdentityToken() ([]byte, error) {
	token, err := f.read()
	return []byte(token), err
}

type tokenFileError struct{ error }

// errNoMetadata ends the wait for the instance metadata service.
var errNoMetadata = withHint(fmt.Errorf("no other source is configured, and the instance metadata service does not answer within %v", metadataTimeout), noMetadataHint)

const noMetadataHint = sourceHelp + "; on EC2, a pod needs the metadata option HttpPutResponseHopLimit to be 2 or more"

// explain turns an error of the SDK into one line and a hint. The SDK's own text wraps the cause five times and may hold
// a server's whole body; of that only the code, message and request id of a real AWS error are kept.
func (a *awsSettings) explain(ctx context.Context, doing string, err error, redact *redactor) error {
	text, hint := a.diagnose(ctx, err, redact)
	text = redact.text(text)
	if tried, ok := errors.AsType[*retry.MaxAttemptsError](err); ok && tried.Attempt > 1 {
		text += fmt.Sprintf(" (tried %d times)", tried.Attempt)
	}
	return withHint(errors.New(doing+": "+text), hint)
}

func (a *awsSettings) diagnose(ctx context.Context, err error, redact *redactor) (text, hint string) {
	operation := ""
	if op, ok := errors.AsType[*smithy.OperationError](err); ok && op.ServiceID != imds.ServiceID {
		operation = op.OperationName // of ECR or STS
	}
	if file, ok := errors.AsType[*tokenFileError](err); ok {
		return "reading the token: " + file.Error(), "the token must be projected into the pod and readable by its user (securityContext.fsGroup)"
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause.Error(), hintOf(cause)
	}
	answer, answered := errors.AsType[interface {
		error
		HTTPStatusCode() int
	}](err)
	if api, ok := errors.AsType[smithy.APIError](err); ok && api.ErrorCode() != "" && api.ErrorCode() != "UnknownError" {
		text = oneLine(api.ErrorCode()+": "+api.ErrorMessage(), redact)
		if answered {
			text += fmt.Sprintf(" (HTTP %d", answer.HTTPStatusCode())
			if id, ok := errors.AsType[*awshttp.ResponseError](err); ok && id.RequestID != "" {
				text += ", request ID " + oneLine(id.RequestID, redact)
			}
			text += ")"
		}
		return text, a.hintForCode(operation, api)
	}
	_, unsent := errors.AsType[*smithyhttp.RequestSendError](err)
	_, broken := errors.AsType[*net.OpError](err) // in the middle of the answer
	_, garbled := errors.AsType[*smithy.DeserializationError](err)
	switch {
	case unsent || broken: // before the others, as the SDK wraps this one in them as well
		return a.diagnoseTransport(err, operation, redact)
	case answered && answer.HTTPStatusCode() >= 300:
		text = fmt.Sprintf("HTTP %d %s", answer.HTTPStatusCode(), http.StatusText(answer.HTTPStatusCode()))
		if operation != "" {
			text += ", and the body is no AWS error"
		} else if agent, ok := errors.AsType[smithy.APIError](err); ok && strings.HasPrefix(agent.ErrorMessage(), "[") && strings.Contains(agent.ErrorMessage(), "]: (") {
			text += ": " + oneLine(agent.ErrorMessage(), redact) // how the EKS agent passes on an AWS error: [request ID]: (code): message
		}
	case errors.Is(err, errNoKey):
		text = err.Error()
	case answered || garbled:
		text = "the answer is not AWS's, or was cut short"
	default:
		return a.diagnoseTransport(err, operation, redact)
	}
	switch {
	case answered && answer.HTTPStatusCode() >= 500 && operation != "":
		hint = "AWS, or a proxy before it, is unwell: the next run will try again"
	case answered && answer.HTTPStatusCode() >= 300 && answer.HTTPStatusCode() < 400:
		hint = "redirects are not followed, the credentials would go with them: is AWS_ENDPOINT_URL right, or does a captive portal answer?"
	case operation == "" && a.source == container:
		hint = podIdentityHint
	case operation == "" && a.source == instanceMetadata:
		hint = instanceRoleHint
	default:
		hint = "something other than AWS answers: look for a proxy, a captive portal or a wrong AWS_ENDPOINT_URL"
	}
	return text, hint
}

// Hints of the two sources that are not AWS's own endpoints.
const (
	instanceRoleHint = "does the instance have an IAM role that EC2 may assume? Else " + sourceHelp
	podIdentityHint  = "does an EKS Pod Identity association exist for this namespace and ServiceAccount, and does the eks-pod-identity-agent run on this node?"
)

// hintForCode names the cure of an error that AWS itself answered.
func (a *awsSettings) hintForCode(operation string, err smithy.APIError) string {
	code, message := err.ErrorCode(), err.ErrorMessage()
	denied := strings.HasPrefix(code, "AccessDenied")
	switch {
	case operation == "" && a.source == container:
		return podIdentityHint
	case operation == "" && a.source == instanceMetadata:
		return instanceRoleHint
	case operation == "AssumeRoleWithWebIdentity" && denied:
		return fmt.Sprintf("does the role %s exist, and does its trust policy allow sts:AssumeRoleWithWebIdentity to this cluster's OIDC provider, for sub system:serviceaccount:NAMESPACE:SERVICEACCOUNT and aud sts.amazonaws.com?", a.roleARN)
	case operation == "AssumeRoleWithWebIdentity" && (code == "InvalidIdentityToken" || strings.HasPrefix(code, "IDP")):
		return "the cluster's service-account issuer must be an IAM OIDC identity provider in the role's account, reachable by AWS and with the audience sts.amazonaws.com"
	case operation == "AssumeRole" && denied:
		return fmt.Sprintf("the identity must be allowed sts:AssumeRole on %s, and that role's trust policy must name it (and the external ID, if it asks for one: --assume-role-external-id)", a.assumeRoleARN)
	case denied:
		return "allow the action ecr:GetAuthorizationToken on resource * to this identity"
	case operation == "AssumeRoleWithWebIdentity" && strings.HasPrefix(code, "ExpiredToken"):
		return fmt.Sprintf("the kubelet must rotate the token in %s (a projected volume), and this node's clock must be right", a.webIdentityTokenFile)
	case operation == "GetAuthorizationToken" && (a.source != accessKeys || a.assumeRoleARN != "") &&
		(strings.HasPrefix(code, "ExpiredToken") || code == "UnrecognizedClientException"): // the run was given them just now
		return "AWS does not take the credentials that it issued: is the region enabled in the account, and of the role's partition? Is this node's clock right?"
	case strings.HasPrefix(code, "ExpiredToken"):
		return "the credentials have expired: renew them, or use access keys without a session token"
	case code == "UnrecognizedClientException" || code == "InvalidClientTokenId" || code == "InvalidAccessKeyId":
		return "AWS does not know this access key: is AWS_ACCESS_KEY_ID right, active, and of this region's partition? Temporary keys (ASIA...) need AWS_SESSION_TOKEN"
	case strings.HasPrefix(code, "RequestTime") || code == "RequestExpired" || code == "RequestInTheFuture" ||
		strings.HasPrefix(message, "Signature expired") || strings.HasPrefix(message, "Signature not yet current"):
		return "this node's clock is wrong: set it, AWS allows 5 minutes"
	case code == "InvalidSignatureException" || code == "SignatureDoesNotMatch" || strings.HasPrefix(code, "IncompleteSignature"):
		return "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID, or was copied in part; a wrong clock on this node shows the same"
	case strings.Contains(code, "Throttl") || code == "TooManyRequestsException" || code == "ServerException" || code == "InternalFailure" || code == "ServiceUnavailable":
		return "AWS is throttling or unwell: the next run will try again"
	}
	return "look the code up in the AWS documentation of this call"
}

// diagnoseTransport explains why no answer came.
func (a *awsSettings) diagnoseTransport(err error, operation string, redact *redactor) (text, hint string) {
	text = err.Error()
	dns, isDNS := errors.AsType[*net.DNSError](err)
	op, isOp := errors.AsType[*net.OpError](err)
	if isOp { // without what the SDK puts around it
		text = op.Error()
	}
	if ue, ok := errors.AsType[*url.Error](err); ok {
		text = ue.Err.Error()
		if u, err := url.Parse(ue.URL); err == nil {
			text = u.Host + ": " + text
		}
	}
	if _, cause, found := strings.Cut(text, "ec2imds: getToken, "); found { // IMDS's client hides its errors' parts from errors.As
		if _, sent, found := strings.Cut(cause, "request send failed, "); found {
			cause = sent
		}
		text = "no other source is configured, and the instance metadata service gives no session token: " + cause
	}
	text = transportText(text, redact)
	_, refusedByProxy := errors.AsType[*proxyError](err)
	_, untrusted := errors.AsType[*tls.CertificateVerificationError](err)
	switch {
	case refusedByProxy || isOp && op.Op == "proxyconnect":
		hint = "check HTTPS_PROXY and NO_PROXY, and whether the proxy allows this host"
	case untrusted:
		hint = "if a proxy with a CA of its own is in the way, mount that CA and name its file in AWS_CA_BUNDLE; if the certificate is not valid now, look at this node's clock"
	case errors.Is(err, http.ErrSchemeMismatch):
		hint = "something other than AWS answers: look for a proxy, a captive portal or a wrong AWS_ENDPOINT_URL"
	case operation == "" && a.source == container:
		hint = podIdentityHint
	case operation == "" && a.source == instanceMetadata:
		hint = noMetadataHint
	case isDNS && dns.IsNotFound:
		hint = "does the region exist (--region, AWS_REGION, --registry)? Else look at the pod's DNS"
	default:
		hint = "can this pod reach AWS? Look for a firewall, a network policy, or a proxy to name in HTTPS_PROXY"
	}
	return text, hint
}

// proxyError is a proxy's refusal to connect.
type proxyError struct{ status int }

func (e *proxyError) Error() string { return fmt.Sprintf("the proxy refused with HTTP %d", e.status) }

func checkProxyAnswer(_ context.Context, _ *url.URL, _ *http.Request, resp *http.Response) error {
	if resp.StatusCode != http.StatusOK {
		return &proxyError{resp.StatusCode}
	}
	return nil
}
