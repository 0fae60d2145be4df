package standin

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Key is an AWS access key. SessionToken is empty for a long-lived one.
type Key struct{ ID, Secret, SessionToken string }

// maxSkew is how far a signature's time may be from the service's. See
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-signing-elements.html: "within five minutes of the time
// stamp in the request".
const maxSkew = 5 * time.Minute

const amzDate = "20060102T150405Z"

// keyring holds the keys that may call a service, by access key ID.
type keyring struct {
	keysMu  sync.Mutex
	keys    map[string]Key
	expired map[string]bool
	denied  map[string]bool
}

// Allow lets k call.
func (ring *keyring) Allow(k Key) {
	ring.keysMu.Lock()
	defer ring.keysMu.Unlock()
	if ring.keys == nil {
		ring.keys, ring.expired, ring.denied = map[string]Key{}, map[string]bool{}, map[string]bool{}
	}
	ring.keys[k.ID] = k
	delete(ring.expired, k.ID)
	delete(ring.denied, k.ID)
}

// Expire makes k known, its session over: calls get ExpiredTokenException (STS: ExpiredToken).
func (ring *keyring) Expire(k Key) {
	ring.Allow(k)
	ring.keysMu.Lock()
	defer ring.keysMu.Unlock()
	ring.expired[k.ID] = true
}

// Deny makes k known without the permission to call: calls get AccessDeniedException (STS: AccessDenied).
func (ring *keyring) Deny(k Key) {
	ring.Allow(k)
	ring.keysMu.Lock()
	defer ring.keysMu.Unlock()
	ring.denied[k.ID] = true
}

// sigFault is what is wrong with a request's signature. The services name the same faults differently.
type sigFault int

const (
	sigOK sigFault = iota
	sigMissing
	sigIncomplete
	sigUnknownKey
	sigExpiredToken
	sigWrong
	sigDenied
)

// check verifies r's signature version 4 over body for service. An empty region accepts any. The region that r was signed
// for is returned with sigOK, a message with all others but sigDenied.
func (ring *keyring) check(r *http.Request, body []byte, service, region string, now time.Time) (signedRegion string, fault sigFault, message string) {
	authorization := r.Header.Get("Authorization")
	if authorization == "" {
		return "", sigMissing, "Missing Authentication Token"
	}
	m := authorizationHeader.FindStringSubmatch(authorization)
	if m == nil {
		return "", sigIncomplete, "Authorization header requires 'Credential', 'Signature' and 'SignedHeaders' parameters."
	}
	id, scope, signed, got := m[1], m[2], strings.Split(m[3], ";"), m[4]

	ring.keysMu.Lock()
	key, known := ring.keys[id]
	expired, denied := ring.expired[id], ring.denied[id]
	ring.keysMu.Unlock()
	if !known || r.Header.Get("X-Amz-Security-Token") != key.SessionToken {
		return "", sigUnknownKey, "The security token included in the request is invalid."
	}
	if expired {
		return "", sigExpiredToken, "The security token included in the request is expired"
	}

	date, err := time.Parse(amzDate, r.Header.Get("X-Amz-Date"))
	if err != nil {
		return "", sigIncomplete, "Date must be in ISO-8601 'basic format'. Got '" + r.Header.Get("X-Amz-Date") + "'."
	}
	parts := strings.Split(scope, "/")
	switch {
	case len(parts) != 4 || parts[3] != "aws4_request":
		return "", sigWrong, "Credential should be scoped with a valid terminator: 'aws4_request'."
	case parts[0] != date.Format("20060102"):
		return "", sigWrong, "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP"
	case region != "" && parts[1] != region || parts[1] == "":
		return "", sigWrong, "Credential should be scoped to a valid region."
	case parts[2] != service:
		return "", sigWrong, fmt.Sprintf("Credential should be scoped to correct service: '%s'.", service)
	}
	for name := range r.Header {
		if name = strings.ToLower(name); strings.HasPrefix(name, "x-amz-") && !slices.Contains(signed, name) {
			return "", sigWrong, fmt.Sprintf("'%s' must be a 'SignedHeader' in the AWS Authorization.", name)
		}
	}
	if !slices.Contains(signed, "host") {
		return "", sigWrong, "'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization."
	}
	if want := signature(key.Secret, scope, date, canonicalRequest(r, signed, body)); !hmac.Equal([]byte(got), []byte(want)) {
		return "", sigWrong, "The request signature we calculated does not match the signature you provided. " +
			"Check your AWS Secret Access Key and signing method. Consult the service documentation for details."
	}
	now = now.UTC()
	if limit := now.Add(-maxSkew); date.Before(limit) {
		return "", sigWrong, fmt.Sprintf("Signature expired: %s is now earlier than %s (%s - 5 min.)",
			date.Format(amzDate), limit.Format(amzDate), now.Format(amzDate))
	}
	if limit := now.Add(maxSkew); date.After(limit) {
		return "", sigWrong, fmt.Sprintf("Signature not yet current: %s is still later than %s (%s + 5 min.)",
			date.Format(amzDate), limit.Format(amzDate), now.Format(amzDate))
	}
	if denied {
		return parts[1], sigDenied, ""
	}
	return parts[1], sigOK, ""
}

// authorizationHeader matches the header's access key ID, scope, signed headers and signature.
var authorizationHeader = regexp.MustCompile(
	`^AWS4-HMAC-SHA256 +Credential=([A-Za-z0-9_]+)/([^, ]+), *SignedHeaders=([a-z0-9;-]+), *Signature=([0-9a-f]{64})$`)

// canonicalRequest is step 1 of https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html.
func canonicalRequest(r *http.Request, signed []string, body []byte) string {
	var b strings.Builder
	path := r.URL.EscapedPath()
	if path == "" {
		path = "/"
	}
	segments := strings.Split(path, "/")
	for i := range segments {
		segments[i] = uriEncode(segments[i]) // all services but S3 encode a path twice
	}
	fmt.Fprintf(&b, "%s\n%s\n", r.Method, strings.Join(segments, "/"))

	var query []string
	for name, values := range r.URL.Query() {
		for _, value := range values {
			query = append(query, uriEncode(name)+"="+uriEncode(value))
		}
	}
	slices.Sort(query)
	fmt.Fprintf(&b, "%s\n", strings.Join(query, "&"))

	for _, name := range signed {
		var values []string
		switch name {
		case "host": // net/http takes it out of the header
			values = []string{r.Host}
		case "content-length":
			values = []string{strconv.FormatInt(r.ContentLength, 10)}
		default:
			values = slices.Clone(r.Header.Values(name))
		}
		for i := range values {
			values[i] = strings.Join(strings.Fields(values[i]), " ")
		}
		fmt.Fprintf(&b, "%s:%s\n", name, strings.Join(values, ","))
	}
	fmt.Fprintf(&b, "\n%s\n%x", strings.Join(signed, ";"), sha256.Sum256(body))
	return b.String()
}

// signature is steps 2 to 4: the string to sign, the derived key, and the signature in hexadecimal digits.
func signature(secret, scope string, date time.Time, canonical string) string {
	toSign := fmt.Sprintf("AWS4-HMAC-SHA256\n%s\n%s\n%x", date.Format(amzDate), scope, sha256.Sum256([]byte(canonical)))
	key := []byte("AWS4" + secret)
	for _, part := range append(strings.Split(scope, "/"), toSign) {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	return hex.EncodeToString(key)
}

// uriEncode encodes all but RFC 3986's unreserved characters, a space as %20.
func uriEncode(s string) string {
	return strings.ReplaceAll(url.QueryEscape(s), "+", "%20")
}
