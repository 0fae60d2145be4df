// Command ecr-refresher gets an Amazon ECR authorization token and writes it into one image-pull Secret of a Kubernetes
// cluster. It runs once and exits; a CronJob starts it every few hours.
package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/pflag"
)

// version is the program's version; a release sets it with -ldflags "-X main.version=...".
var version = "0.1.0"

// Exit codes. A CronJob's podFailurePolicy can tell them apart: only exitFailure is worth another try.
const (
	exitOK      = 0 // the Secret was patched, or a dry run passed
	exitFailure = 1 // AWS, API server, network, RBAC, missing Secret, deadline, signal
	exitUsage   = 2 // flags or environment: no retry cures it
)

const usage = `ecr-refresher writes an Amazon ECR authorization token into one Kubernetes image-pull Secret.

Usage:
  ecr-refresher --secret NAME [flags]

Flags:
  --secret                    the image-pull Secret to patch (required)
  --namespace                 its namespace (default: the pod's own, from the service-account mount)
  --registry                  registry host that gets the credentials; repeatable (default: the registry that ECR names)
  --region                    AWS region of the ECR call (default: from --registry, else AWS_REGION, else AWS_DEFAULT_REGION)
  --assume-role-arn           role to assume before the ECR call, for a registry in another account (default: none)
  --assume-role-external-id   external ID that the role's trust policy asks for (default: none)
  --dry-run                   do everything, but have the API server store nothing (default: false)
  --timeout                   deadline of the whole run (default: 1m)
  --log-format                text or json (default: text)
  --api-server                base URL of the Kubernetes API (default: https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT)
  --service-account-dir       folder with token, ca.crt and namespace (default: /var/run/secrets/kubernetes.io/serviceaccount)
  --version                   print the version and exit
  --help                      print this text and exit

AWS is configured by the environment: AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the variables that
IRSA and EKS Pod Identity set. Exit codes: 0 the Secret was patched, 1 another try may help, 2 the configuration is wrong.

Examples:
  ecr-refresher --secret ecr-credentials
  ecr-refresher --secret ecr-credentials --registry 123456789012.dkr.ecr.eu-central-1.amazonaws.com
  ecr-refresher --secret ecr-credentials --namespace build --region us-east-1 --dry-run
`

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}

// run is the program: it returns the exit code, and its last line on stderr is the result.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	start := time.Now()
	signal.Ignore(syscall.SIGPIPE) // a closed stderr must not end a run before its patch
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	redact := &redactor{}
	s, err := parseSettings(args, getenv, redact)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return exitOK
	case s.version:
		fmt.Fprintln(stdout, "ecr-refresher", version)
		return exitOK
	}
	log := newLogger(impatientWriter{stderr}, s.logFormat)
	fail := func(err error) {
		plain := strings.NewReplacer(`"`, `'`) // which the text format need not escape
		log.Error(plain.Replace(redact.text(err.Error())), "hint", plain.Replace(redact.text(hintOf(err))))
	}
	if err != nil {
		fail(err)
		return exitUsage
	}

	ctx, cancel := context.WithTimeoutCause(ctx, s.timeout, withHint(
		fmt.Errorf("the run's deadline of %v (--timeout) has passed", s.timeout), "find out what is slow, or raise --timeout"))
	defer cancel()
	done, err := refresh(ctx, s, redact, log)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil { // whatever was going on then is not to blame
			err = withHint(err, cmp.Or(hintOf(cause), "the run was stopped from outside; the Secret is as it was, unless the API server had just taken the patch"))
		}
		fail(err)
		return exitFailure
	}
	log.Info("secret "+done.verb(s.dryRun),
		"secret", s.namespace+"/"+s.secret,
		"registries", strings.Join(done.registries, ","),
		"regions", strings.Join(done.regions, ","),
		"credentials", s.aws.source.String(),
		"expires", done.expiresAt.UTC().Format(time.RFC3339),
		"took", time.Since(start).Round(time.Millisecond))
	return exitOK
}

func newLogger(w io.Writer, format string) *slog.Logger {
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, nil))
	}
	return slog.New(slog.NewTextHandler(w, nil))
}

// impatientWriter gives up on a reader that does not read: a full pipe must neither hold a run beyond its deadline nor
// hide its exit code.
type impatientWriter struct{ io.Writer }

func (w impatientWriter) Write(p []byte) (int, error) {
	p = slices.Clone(p) // the write may outlive this call
	done := make(chan struct{})
	var n int
	var err error
	go func() {
		n, err = w.Writer.Write(p)
		close(done)
	}()
	select {
	case <-done:
		return n, err
	case <-time.After(time.Second):
		return 0, os.ErrDeadlineExceeded
	}
}

// settings is all that a run is told, checked.
type settings struct {
	secret, namespace string
	registries        []string            // as given; empty: the one that ECR names
	region            string              // of --region
	regions           map[string][]string // region to its registries: one ECR call each
	dryRun            bool
	timeout           time.Duration
	logFormat         string
	apiServer         *url.URL
	apiServerRoots    *x509.CertPool
	serviceAccountDir string
	version           bool
	aws               awsSettings
}

// parseSettings reads flags, environment and service-account mount. Its error holds all that is wrong, so that nobody
// has to mend one mistake a run; it is pflag.ErrHelp when help was asked for.
func parseSettings(args []string, getenv func(string) string, redact *redactor) (*settings, error) {
	// Before anything can be printed: an argument may hold the value of one of them.
	for _, name := range []string{"AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN"} {
		redact.add(getenv(name))
	}
	var errs []error
	invalid := func(name, format string, a ...any) {
		errs = append(errs, fmt.Errorf("invalid "+name+": "+format, a...))
	}

	var s *settings
	var flags *pflag.FlagSet
	var apiServer, timeout string
	for { // once more without each unknown flag, so that the others are checked as well
		s = &settings{}
		flags = pflag.NewFlagSet("ecr-refresher", pflag.ContinueOnError)
		flags.SortFlags = false
		flags.Usage = func() {}
		flags.StringVar(&s.secret, "secret", "", "")
		flags.StringVar(&s.namespace, "namespace", "", "")
		flags.StringArrayVar(&s.registries, "registry", nil, "")
		flags.StringVar(&s.region, "region", "", "")
		flags.StringVar(&s.aws.assumeRoleARN, "assume-role-arn", "", "")
		flags.StringVar(&s.aws.assumeRoleExternalID, "assume-role-external-id", "", "")
		flags.BoolVar(&s.dryRun, "dry-run", false, "")
		flags.StringVar(&timeout, "timeout", "1m", "")
		flags.StringVar(&s.logFormat, "log-format", "text", "")
		flags.StringVar(&apiServer, "api-server", "", "")
		flags.StringVar(&s.serviceAccountDir, "service-account-dir", "/var/run/secrets/kubernetes.io/serviceaccount", "")
		flags.BoolVar(&s.version, "version", false, "")

		var bad []error
		err := flags.ParseAll(args, func(f *pflag.Flag, value string) error {
			if f.Value.Set(value) != nil {
				bad = append(bad, fmt.Errorf("invalid flag --%s: %q is not true or false", f.Name, value)) // the one type that can fail
			}
			return nil
		})
		if errors.Is(err, pflag.ErrHelp) {
			return s, err
		}
		unknown, ok := errors.AsType[*pflag.NotExistError](err)
		if !ok {
			errs = append(errs, bad...)
			if err != nil { // a flag without its value
				errs = append(errs, err)
			}
			break
		}
		name := "--" + unknown.GetSpecifiedName()
		if short := unknown.GetSpecifiedShortnames(); short != "" {
			name = "-" + short
		}
		i := slices.IndexFunc(args, func(arg string) bool { return arg == name || strings.HasPrefix(arg, name+"=") })
		errs = append(errs, fmt.Errorf("unknown flag: %s", strings.SplitN(name, "=", 2)[0]))
		args = slices.Delete(slices.Clone(args), i, i+1)
	}
	if flags.NArg() > 0 {
		errs = append(errs, fmt.Errorf("unexpected argument: %q", flags.Arg(0)))
	}

	if s.logFormat != "text" && s.logFormat != "json" {
		invalid("flag --log-format", "%q is neither text nor json", s.logFormat)
	}
	var err error
	if s.timeout, err = time.ParseDuration(timeout); err != nil || s.timeout <= 0 {
		invalid("flag --timeout", "%q is not a duration above zero, such as 30s or 1m", timeout)
	}
	if s.secret == "" {
		errs = append(errs, errors.New("required flag: --secret"))
	} else if !isDNSName(s.secret) {
		invalid("flag --secret", "%q is not a DNS-1123 name (lower-case letters, digits, '-' and '.')", s.secret)
	}
	s.parseKubernetes(getenv, apiServer, invalid)
	s.parseRegistries(getenv, invalid)
	s.aws.parse(getenv, redact, invalid)
	if len(errs) > 0 {
		texts := make([]string, len(errs))
		for i, err := range errs {
			texts[i] = err.Error()
		}
		return s, withHint(errors.New(strings.Join(texts, "; ")), "see ecr-refresher --help")
	}
	return s, nil
}

// parseKubernetes finds the API server and what the service-account mount holds.
func (s *settings) parseKubernetes(getenv func(string) string, apiServer string, invalid func(name, format string, a ...any)) {
	var err error
	if apiServer != "" {
		if s.apiServer, err = parseAPIServer(apiServer); err != nil {
			invalid("flag --api-server", "%q %v", apiServer, err)
		}
	} else if s.apiServer, err = inClusterServer(getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")); err != nil {
		invalid("environment", "%v", err)
	}

	mount := "service-account mount (--service-account-dir)"
	if _, err := os.Stat(s.serviceAccountDir); err != nil {
		invalid(mount, "%v: the pod needs automountServiceAccountToken: true", err)
		return
	}
	if _, err := readToken(s.serviceAccountDir); err != nil {
		invalid(mount, "%v", err)
	}
	if pem, err := readServiceAccountFile(s.serviceAccountDir, "ca.crt"); err != nil {
		invalid(mount, "%v", err)
	} else if s.apiServerRoots = x509.NewCertPool(); !s.apiServerRoots.AppendCertsFromPEM([]byte(pem)) {
		invalid(mount, "%s holds no certificate", filepath.Join(s.serviceAccountDir, "ca.crt"))
	}
	if s.namespace != "" {
		if !isDNSLabel(s.namespace) {
			invalid("flag --namespace", "%q is not a DNS-1123 label (lower-case letters, digits and '-', at most 63)", s.namespace)
		}
	} else if s.namespace, err = readServiceAccountFile(s.serviceAccountDir, "namespace"); err != nil {
		invalid(mount, "%v; give --namespace", err)
	} else if !isDNSLabel(s.namespace) {
		invalid(mount, "%s does not hold a namespace's name", filepath.Join(s.serviceAccountDir, "namespace"))
	}
}

// parseRegistries finds the region of each registry, and so the ECR calls to make. The region in a registry's host wins
// over AWS_REGION, which EKS sets to the cluster's region wherever the registry lies.
func (s *settings) parseRegistries(getenv func(string) string, invalid func(name, format string, a ...any)) {
	if s.region != "" && !isDNSLabel(s.region) {
		invalid("flag --region", "%q is not an AWS region", s.region)
	}
	s.regions = map[string][]string{}
	firstRegion := s.region
	for _, value := range s.registries {
		host := strings.TrimSuffix(strings.TrimPrefix(value, "https://"), "/")
		region, err := registryRegion(host)
		switch {
		case err != nil:
			invalid("flag --registry", "%q %v", value, err)
		case region == "" && s.region == "":
			invalid("flag --registry", "%q is no ECR host, so its region is not known: give --region", value)
		case region != "" && s.region != "" && region != s.region:
			invalid("flag --region", "%s contradicts --registry %s, which lies in %s", s.region, host, region)
		default:
			region = cmp.Or(region, s.region)
			firstRegion = cmp.Or(firstRegion, region)
			s.regions[region] = append(s.regions[region], host)
		}
	}
	var fromEnv string
	for _, name := range []string{"AWS_DEFAULT_REGION", "AWS_REGION"} {
		if v := getenv(name); v != "" {
			if fromEnv = v; !isDNSLabel(v) {
				invalid("environment "+name, "%q is not an AWS region", v)
			}
		}
	}
	if len(s.registries) == 0 {
		region := cmp.Or(s.region, fromEnv)
		if region == "" {
			invalid("region", "none is given: set --region, --registry or AWS_REGION")
		}
		s.regions[region] = nil
	}
	// STS is called where the cluster is, which on EKS is AWS_REGION; else where the registry is.
	s.aws.stsRegion = cmp.Or(fromEnv, firstRegion)
}

// isDNSLabel and isDNSName check the names of namespaces and of Secrets as Kubernetes does: a DNS-1123 label and
// subdomain. https://kubernetes.io/docs/concepts/overview/working-with-objects/names/
func isDNSLabel(s string) bool { return len(s) <= 63 && isLabel(s) }

func isDNSName(s string) bool {
	return len(s) <= 253 && !slices.ContainsFunc(strings.Split(s, "."), func(l string) bool { return !isLabel(l) })
}

func isLabel(s string) bool {
	return s != "" && s[0] != '-' && s[len(s)-1] != '-' && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// hintError is an error with its cure, which is printed beside it.
type hintError struct {
	error
	hint string
}

func (e *hintError) Unwrap() error { return e.error }

func withHint(err error, hint string) error { return &hintError{err, hint} }

func hintOf(err error) string {
	if e, ok := errors.AsType[*hintError](err); ok {
		return e.hint
	}
	return ""
}

// redactor removes secrets from texts that are about to be printed. It is safe for concurrent use.
type redactor struct {
	mu      sync.Mutex
	secrets []string
	forms   []string // of the secrets, the longest first; nil until a text needs them, as in a good run none does
}

// add makes secrets known. Those of less than 4 bytes are left out: their removal would garble any text and hide little.
func (r *redactor) add(secrets ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range secrets {
		if len(s) >= 4 && !slices.Contains(r.secrets, s) {
			r.secrets = append(r.secrets, s)
			r.forms = nil
		}
	}
}

// text returns s without the secrets, without the forms in which a server may send them back (base64, URL-encoded,
// quoted), and without the user and password of any URL.
func (r *redactor) text(s string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.forms == nil {
		for _, s := range r.secrets {
			b := []byte(s)
			quoted := fmt.Sprintf("%q", s)
			r.forms = append(r.forms, s, base64.StdEncoding.EncodeToString(b), base64.RawStdEncoding.EncodeToString(b),
				base64.URLEncoding.EncodeToString(b), base64.RawURLEncoding.EncodeToString(b),
				url.QueryEscape(s), url.PathEscape(s), quoted[1:len(quoted)-1])
		}
		slices.SortFunc(r.forms, func(a, b string) int { return len(b) - len(a) })
	}
	for _, form := range r.forms {
		s = strings.ReplaceAll(s, form, "[redacted]")
	}
	return regexp.MustCompile(`//[^/\s'"]*@`).ReplaceAllString(s, "//[redacted]@")
}
