package standin

import (
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// ECR answers GetAuthorizationToken of
// https://docs.aws.amazon.com/AmazonECR/latest/APIReference/API_GetAuthorizationToken.html.
type ECR struct {
	Region    string           // region that calls must be signed for; empty: any
	Account   string           // 12 digits, in proxyEndpoint
	Password  string           // the token is base64("AWS:" + Password)
	ExpiresAt time.Time        // zero: 12 hours from now
	Now       func() time.Time // the service's clock; nil: time.Now
	Intercept Intercept

	keyring
	recorder
}

// Token returns the authorizationToken that e hands out.
func (e *ECR) Token() string {
	return base64.StdEncoding.EncodeToString([]byte("AWS:" + e.Password))
}

func (e *ECR) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	now := clock(w, e.Now)
	body, done := e.begin(w, r, e.Intercept)
	if done {
		return
	}
	if r.Method != http.MethodPost || r.URL.Path != "/" || r.URL.RawQuery != "" ||
		r.Header.Get("X-Amz-Target") != "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken" ||
		r.Header.Get("Content-Type") != "application/x-amz-json-1.1" {
		AWSError(w, http.StatusBadRequest, "UnknownOperationException", "")
		return
	}
	region, fault, message := e.check(r, body, "ecr", e.Region, now)
	if fault != sigOK {
		code := map[sigFault]string{
			sigMissing:      "MissingAuthenticationTokenException",
			sigIncomplete:   "IncompleteSignatureException",
			sigUnknownKey:   "UnrecognizedClientException",
			sigExpiredToken: "ExpiredTokenException",
			sigWrong:        "InvalidSignatureException",
			sigDenied:       "AccessDeniedException",
		}[fault]
		if fault == sigDenied {
			message = "User: arn:aws:iam::123456789012:user/puller is not authorized to perform: ecr:GetAuthorizationToken on " +
				"resource: * because no identity-based policy allows the ecr:GetAuthorizationToken action"
		}
		AWSError(w, http.StatusBadRequest, code, message)
		return
	}
	var input struct {
		RegistryIDs []string `json:"registryIds"`
	}
	if err := json.Unmarshal(body, &input); err != nil {
		AWSError(w, http.StatusBadRequest, "SerializationException", "")
		return
	}
	expiresAt := e.ExpiresAt
	if expiresAt.IsZero() {
		expiresAt = now.Add(12 * time.Hour)
	}
	registries := input.RegistryIDs
	if len(registries) == 0 {
		registries = []string{e.Account}
	}
	type authorizationData struct {
		AuthorizationToken string      `json:"authorizationToken"`
		ExpiresAt          json.Number `json:"expiresAt"` // epoch seconds
		ProxyEndpoint      string      `json:"proxyEndpoint"`
	}
	var data []authorizationData
	for _, registry := range registries {
		data = append(data, authorizationData{
			AuthorizationToken: e.Token(),
			ExpiresAt:          json.Number(fmt.Sprintf("%d.%03d", expiresAt.Unix(), expiresAt.Nanosecond()/1e6)),
			ProxyEndpoint:      fmt.Sprintf("https://%s.dkr.ecr.%s.amazonaws.com", registry, region),
		})
	}
	writeAWSJSON(w, http.StatusOK, map[string]any{"authorizationData": data})
}

// AWSError answers as ECR does when it fails: in AWS's JSON 1.1 protocol.
func AWSError(w http.ResponseWriter, status int, code, message string) {
	answer := map[string]string{"__type": code}
	if message != "" {
		answer["message"] = message
	}
	writeAWSJSON(w, status, answer)
}

func writeAWSJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.Header().Set("X-Amzn-Requestid", newUUID())
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// clock returns the service's time and states it in the Date header, from which clients learn that their own clock is off.
func clock(w http.ResponseWriter, now func() time.Time) time.Time {
	if now == nil {
		now = time.Now
	}
	t := now()
	w.Header().Set("Date", t.UTC().Format(http.TimeFormat))
	return t
}

// STS answers AssumeRoleWithWebIdentity and AssumeRole in AWS's query protocol. See
// https://docs.aws.amazon.com/STS/latest/APIReference/.
type STS struct {
	Region           string // region that signed calls must be signed for; empty: any
	RoleArn          string // what AssumeRoleWithWebIdentity demands
	WebIdentityToken string
	AssumeRoleArn    string // what AssumeRole demands
	ExternalID       string // empty: the trust policy asks for none
	Issue            Key    // what AssumeRoleWithWebIdentity hands out
	IssueAssumed     Key    // what AssumeRole hands out
	Now              func() time.Time
	Intercept        Intercept

	keyring
	recorder
}

var roleSessionName = regexp.MustCompile(`^[\w+=,.@-]{2,64}$`)

func (s *STS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	now := clock(w, s.Now)
	body, done := s.begin(w, r, s.Intercept)
	if done {
		return
	}
	form, err := url.ParseQuery(string(body))
	contentType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if r.Method != http.MethodPost || r.URL.Path != "/" || contentType != "application/x-www-form-urlencoded" || err != nil {
		STSError(w, http.StatusBadRequest, "MalformedInput", "")
		return
	}
	action := form.Get("Action")
	if form.Get("Version") != "2011-06-15" || action != "AssumeRoleWithWebIdentity" && action != "AssumeRole" {
		STSError(w, http.StatusBadRequest, "InvalidAction",
			fmt.Sprintf("Could not find operation %s for version %s", action, form.Get("Version")))
		return
	}
	required := []string{"RoleArn", "RoleSessionName"}
	if action == "AssumeRoleWithWebIdentity" {
		required = append(required, "WebIdentityToken")
	} else if _, fault, message := s.check(r, body, "sts", s.Region, now); fault != sigOK {
		status, code := http.StatusForbidden, map[sigFault]string{
			sigMissing:      "MissingAuthenticationToken",
			sigIncomplete:   "IncompleteSignature",
			sigUnknownKey:   "InvalidClientTokenId",
			sigExpiredToken: "ExpiredToken",
			sigWrong:        "SignatureDoesNotMatch",
			sigDenied:       "AccessDenied",
		}[fault]
		switch fault {
		case sigMissing:
			message = "Request is missing Authentication Token"
		case sigIncomplete:
			status = http.StatusBadRequest
		case sigDenied:
			message = notAuthorizedToAssume(form.Get("RoleArn"))
		}
		STSError(w, status, code, message)
		return
	}
	for _, name := range required {
		if form.Get(name) == "" {
			STSError(w, http.StatusBadRequest, "ValidationError", fmt.Sprintf("1 validation error detected: Value null at '%s' failed to "+
				"satisfy constraint: Member must not be null", strings.ToLower(name[:1])+name[1:]))
			return
		}
	}
	if name := form.Get("RoleSessionName"); !roleSessionName.MatchString(name) {
		STSError(w, http.StatusBadRequest, "ValidationError", fmt.Sprintf("1 validation error detected: Value '%s' at 'roleSessionName' failed "+
			`to satisfy constraint: Member must satisfy regular expression pattern: [\w+=,.@-]*`, name))
		return
	}

	issue := s.Issue
	switch {
	case action == "AssumeRole":
		issue = s.IssueAssumed
		if form.Get("RoleArn") != s.AssumeRoleArn || s.ExternalID != "" && form.Get("ExternalId") != s.ExternalID {
			STSError(w, http.StatusForbidden, "AccessDenied", notAuthorizedToAssume(form.Get("RoleArn")))
			return
		}
	case form.Get("WebIdentityToken") != s.WebIdentityToken:
		STSError(w, http.StatusBadRequest, "InvalidIdentityToken",
			"The ID Token provided is not a valid JWT. (You may see this error if you sent an Access Token)")
		return
	case form.Get("RoleArn") != s.RoleArn:
		STSError(w, http.StatusForbidden, "AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity")
		return
	}
	writeXML(w, http.StatusOK, `<%[1]sResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><%[1]sResult><AssumedRoleUser>`+
		`<AssumedRoleId>AROA123EXAMPLE123:%[3]s</AssumedRoleId><Arn>%[2]s/%[3]s</Arn></AssumedRoleUser><Credentials>`+
		`<AccessKeyId>%[4]s</AccessKeyId><SecretAccessKey>%[5]s</SecretAccessKey><SessionToken>%[6]s</SessionToken>`+
		`<Expiration>%[7]s</Expiration></Credentials></%[1]sResult><ResponseMetadata><RequestId>%[8]s</RequestId>`+
		`</ResponseMetadata></%[1]sResponse>`,
		action, form.Get("RoleArn"), form.Get("RoleSessionName"), issue.ID, issue.Secret, issue.SessionToken, expiration(now))
}

func notAuthorizedToAssume(role string) string {
	return "User: arn:aws:iam::123456789012:user/puller is not authorized to perform: sts:AssumeRole on resource: " + role
}

// STSError answers as STS does when it fails: in AWS's query protocol.
func STSError(w http.ResponseWriter, status int, code, message string) {
	fault := "Sender"
	if status >= 500 {
		fault = "Receiver"
	}
	writeXML(w, status, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>%s</Type><Code>%s</Code>`+
		`<Message>%s</Message></Error><RequestId>%s</RequestId></ErrorResponse>`, fault, code, message)
}

// writeXML fills the values, escaped, and after them the request's ID into the format.
func writeXML(w http.ResponseWriter, status int, format string, values ...string) {
	id := newUUID()
	var escaped []any
	for _, value := range append(values, id) {
		var b strings.Builder
		xml.EscapeText(&b, []byte(value))
		escaped = append(escaped, b.String())
	}
	w.Header().Set("Content-Type", "text/xml")
	w.Header().Set("X-Amzn-Requestid", id)
	w.WriteHeader(status)
	fmt.Fprintf(w, format, escaped...)
}

// expiration is when credentials end that are handed out now: the services' default of an hour.
func expiration(now time.Time) string {
	return now.Add(time.Hour).UTC().Format(time.RFC3339)
}

// PodIdentity stands in for the EKS Pod Identity agent, which speaks plain HTTP. See
// https://github.com/aws/eks-pod-identity-agent.
type PodIdentity struct {
	Token     string // what the Authorization header must be
	Issue     Key
	Intercept Intercept

	recorder
}

func (p *PodIdentity) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if _, done := p.begin(w, r, p.Intercept); done {
		return
	}
	switch token := r.Header.Get("Authorization"); {
	case r.URL.Path != "/v1/credentials":
		http.NotFound(w, r)
	case token == "":
		http.Error(w, "Service account token cannot be empty", http.StatusBadRequest)
	case token != p.Token:
		PodIdentityError(w, http.StatusBadRequest, "InvalidTokenException", "The token included in the request is invalid")
	default:
		writeJSON(w, http.StatusOK, map[string]string{
			"AccessKeyId":     p.Issue.ID,
			"SecretAccessKey": p.Issue.Secret,
			"Token":           p.Issue.SessionToken,
			"AccountId":       "123456789012",
			"Expiration":      expiration(time.Now()),
		})
	}
}

// PodIdentityError answers as the agent does when the EKS Auth API fails, such as ResourceNotFoundException with 404 when no
// association exists: in plain text.
func PodIdentityError(w http.ResponseWriter, status int, code, message string) {
	fault := "client"
	if status >= 500 {
		fault = "server"
	}
	http.Error(w, fmt.Sprintf("[%s]: (%s): %s, fault: %s", newUUID(), code, message, fault), status)
}

// IMDS stands in for version 2 of the EC2 instance metadata service, with a role's credentials only. It speaks plain HTTP.
// See https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html.
type IMDS struct {
	Role      string // of the instance's profile; empty: it has none
	Issue     Key
	Intercept Intercept

	tokensMu sync.Mutex
	tokens   map[string]time.Time // session tokens and when they end

	recorder
}

func (i *IMDS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if _, done := i.begin(w, r, i.Intercept); done {
		return
	}
	const (
		ttlHeader = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
		roles     = "/latest/meta-data/iam/security-credentials/"
	)
	if r.URL.Path == "/latest/api/token" {
		ttl, err := strconv.Atoi(r.Header.Get(ttlHeader))
		switch {
		case r.Method != http.MethodPut:
			imdsError(w, http.StatusMethodNotAllowed)
		case r.Header.Get("X-Forwarded-For") != "":
			imdsError(w, http.StatusForbidden)
		case err != nil || ttl < 1 || ttl > 21600:
			imdsError(w, http.StatusBadRequest)
		default:
			token := base64.URLEncoding.EncodeToString([]byte(newUUID()))
			i.tokensMu.Lock()
			if i.tokens == nil {
				i.tokens = map[string]time.Time{}
			}
			i.tokens[token] = time.Now().Add(time.Duration(ttl) * time.Second)
			i.tokensMu.Unlock()
			w.Header().Set(ttlHeader, strconv.Itoa(ttl))
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, token)
		}
		return
	}
	i.tokensMu.Lock()
	valid := time.Now().Before(i.tokens[r.Header.Get("X-Aws-Ec2-Metadata-Token")])
	i.tokensMu.Unlock()
	switch {
	case !valid:
		imdsError(w, http.StatusUnauthorized)
	case r.Method != http.MethodGet:
		imdsError(w, http.StatusMethodNotAllowed)
	case i.Role != "" && r.URL.Path == roles:
		w.Header().Set("Content-Type", "text/plain")
		io.WriteString(w, i.Role)
	case i.Role != "" && r.URL.Path == roles+i.Role:
		w.Header().Set("Content-Type", "text/plain") // as the real one labels this JSON
		w.Write(encode(map[string]string{
			"Code":            "Success",
			"LastUpdated":     time.Now().UTC().Format(time.RFC3339),
			"Type":            "AWS-HMAC",
			"AccessKeyId":     i.Issue.ID,
			"SecretAccessKey": i.Issue.Secret,
			"Token":           i.Issue.SessionToken,
			"Expiration":      expiration(time.Now()),
		}))
	default:
		imdsError(w, http.StatusNotFound)
	}
}

// imdsError answers with the HTML page that the metadata service sends.
func imdsError(w http.ResponseWriter, status int) {
	w.Header().Set("Content-Type", "text/html")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n<html><head><title>%[1]d - %[2]s</title></head>"+
		"<body><h1>%[1]d - %[2]s</h1></body></html>\n", status, http.StatusText(status))
}
