package standin

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// The examples are get-vanilla and get-vanilla-query-order-key-case of AWS's Signature Version 4 test suite, and the request
// to IAM that the AWS General Reference signs step by step.
func TestPublishedSignaturesPass(t *testing.T) {
	key := Key{ID: "AKIDEXAMPLE", Secret: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}
	now := time.Date(2015, 8, 30, 12, 36, 0, 0, time.UTC)
	const form = "application/x-www-form-urlencoded; charset=utf-8"
	for _, tt := range []struct{ name, host, target, service, contentType, signed, signature string }{
		{"get-vanilla", "example.amazonaws.com", "/", "service", "", "host;x-amz-date",
			"5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"},
		{"get-vanilla-query-order-key-case", "example.amazonaws.com", "/?Param2=value2&Param1=value1", "service", "", "host;x-amz-date",
			"b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"},
		{"ListUsers", "iam.amazonaws.com", "/?Action=ListUsers&Version=2010-05-08", "iam", form, "content-type;host;x-amz-date",
			"5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := httptest.NewRequest(http.MethodGet, tt.target, nil)
			r.Host = tt.host
			r.Header.Set("X-Amz-Date", "20150830T123600Z")
			if tt.contentType != "" {
				r.Header.Set("Content-Type", tt.contentType)
			}
			r.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20150830/us-east-1/"+tt.service+
				"/aws4_request, SignedHeaders="+tt.signed+", Signature="+tt.signature)
			var ring keyring
			ring.Allow(key)
			region, fault, message := ring.check(r, nil, tt.service, "us-east-1", now)
			if region != "us-east-1" || fault != sigOK {
				t.Fatalf("got %q, fault %d, %q", region, fault, message)
			}

			for _, bad := range []struct {
				name    string
				check   func() (string, sigFault, string)
				fault   sigFault
				message string
			}{
				{"body", func() (string, sigFault, string) { return ring.check(r, []byte("x"), tt.service, "", now) }, sigWrong, "does not match"},
				{"service", func() (string, sigFault, string) { return ring.check(r, nil, "ecr", "", now) }, sigWrong, "correct service: 'ecr'"},
				{"region", func() (string, sigFault, string) { return ring.check(r, nil, tt.service, "eu-west-1", now) }, sigWrong, "valid region"},
				{"late", func() (string, sigFault, string) { return ring.check(r, nil, tt.service, "", now.Add(time.Hour)) }, sigWrong,
					"Signature expired: 20150830T123600Z is now earlier than 20150830T133100Z (20150830T133600Z - 5 min.)"},
				{"early", func() (string, sigFault, string) { return ring.check(r, nil, tt.service, "", now.Add(-time.Hour)) }, sigWrong,
					"Signature not yet current: 20150830T123600Z is still later than 20150830T114100Z (20150830T113600Z + 5 min.)"},
				{"unsigned header", func() (string, sigFault, string) {
					r := r.Clone(t.Context())
					r.Header.Set("X-Amz-Target", "x")
					return ring.check(r, nil, tt.service, "", now)
				}, sigWrong, "'x-amz-target' must be"},
				{"session token", func() (string, sigFault, string) {
					var ring keyring
					ring.Allow(Key{key.ID, key.Secret, "session"})
					return ring.check(r, nil, tt.service, "", now)
				}, sigUnknownKey, "security token included"},
				{"unknown key", func() (string, sigFault, string) {
					return new(keyring).check(r, nil, tt.service, "", now)
				}, sigUnknownKey, "security token included"},
			} {
				if _, fault, message := bad.check(); fault != bad.fault || !strings.Contains(message, bad.message) {
					t.Errorf("%s: got fault %d, %q", bad.name, fault, message)
				}
			}
		})
	}
}

const dockerConfig = "eyJhdXRocyI6e319" // {"auths":{}}

func object(secretType, config string) map[string]any {
	return map[string]any{
		"metadata": map[string]any{"labels": map[string]any{"team": "a"}, "annotations": map[string]any{"note": "keep"}},
		"type":     secretType,
		"data":     map[string]any{".dockerconfigjson": config, "other": "b3RoZXI="},
	}
}

const (
	strict   = "?fieldManager=m&fieldValidation=Strict"
	pullType = "kubernetes.io/dockerconfigjson"
	path     = "/api/v1/namespaces/prod/secrets/"
	bearer   = "Bearer good"
)

func cluster() *Kubernetes {
	k := NewKubernetes("prod")
	k.SetTokens("good")
	k.SetRules(Rule{Namespace: "prod", Verbs: []string{"patch", "create"}, ResourceNames: []string{"pull", "text", "frozen", "new"}},
		Rule{Namespace: "prod", Verbs: []string{"patch"}, ResourceNames: []string{"patch-only"}},
		Rule{Namespace: "gone", Verbs: []string{"patch", "create"}, ResourceNames: []string{"new"}})
	k.Put("prod", "pull", object(pullType, dockerConfig))
	k.Put("prod", "text", object("Opaque", dockerConfig))
	frozen := object(pullType, dockerConfig)
	frozen["immutable"] = true
	k.Put("prod", "frozen", frozen)
	return k
}

func send(k *Kubernetes, method, target, authorization, contentType, accept, body string) (int, map[string]any, string) {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.Header.Set("Authorization", authorization)
	r.Header.Set("Content-Type", contentType)
	r.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	k.ServeHTTP(w, r)
	raw := w.Body.String()
	var answer map[string]any
	json.Unmarshal([]byte(raw), &answer)
	return w.Code, answer, raw
}

func TestKubernetesRefusesAsTheRealServerDoes(t *testing.T) {
	applied := func(name, config string) string {
		return `{"apiVersion":"v1","kind":"Secret","metadata":{"name":"` + name + `"},"type":"` + pullType +
			`","data":{".dockerconfigjson":"` + config + `"}}`
	}
	for _, tt := range []struct {
		name, method, target, authorization, contentType, body string
		code                                                   int
		reason, message                                        string
	}{
		{"wrong token", "PATCH", path + "pull", "Bearer bad", mergePatch, `{}`, 401, "Unauthorized", "Unauthorized"},
		{"no token", "PATCH", path + "pull", "", mergePatch, `{}`, 403, "Forbidden",
			`secrets "pull" is forbidden: User "system:anonymous" cannot patch resource "secrets" in API group "" in the namespace "prod"`},
		{"another name", "PATCH", path + "missing", bearer, mergePatch, `{}`, 403, "Forbidden",
			`secrets "missing" is forbidden: User "system:serviceaccount:prod:ecr-refresher" cannot patch resource "secrets" in API group "" in the namespace "prod"`},
		{"POST", "POST", strings.TrimSuffix(path, "/"), bearer, "application/json", `{}`, 403, "Forbidden",
			`secrets is forbidden: User "system:serviceaccount:prod:ecr-refresher" cannot create resource "secrets" in API group "" in the namespace "prod"`},
		{"unknown path", "PATCH", "/x", bearer, mergePatch, `{}`, 403, "Forbidden",
			`forbidden: User "system:serviceaccount:prod:ecr-refresher" cannot patch path "/x"`},
		{"content type", "PATCH", path + "pull", bearer, "application/json", `{}`, 415, "UnsupportedMediaType", "415: Unsupported Media Type"},
		{"missing", "PATCH", path + "new", bearer, mergePatch, `{}`, 404, "NotFound", `secrets "new" not found`},
		{"missing namespace", "PATCH", "/api/v1/namespaces/gone/secrets/new", bearer, mergePatch, `{}`, 404, "NotFound", `secrets "new" not found`},
		{"create in missing namespace", "PATCH", "/api/v1/namespaces/gone/secrets/new" + strict, bearer, applyPatch, applied("new", dockerConfig),
			404, "NotFound", `namespaces "gone" not found`},
		{"create without the right", "PATCH", path + "patch-only" + strict, bearer, applyPatch, applied("patch-only", dockerConfig), 403, "Forbidden",
			`secrets "patch-only" is forbidden: User "system:serviceaccount:prod:ecr-refresher" cannot create resource "secrets" in API group "" in the namespace "prod"`},
		{"apply without manager", "PATCH", path + "new", bearer, applyPatch, applied("new", dockerConfig), 422, "Invalid",
			`PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: is required for apply patch`},
		{"force", "PATCH", path + "pull?force=true", bearer, mergePatch, `{}`, 422, "Invalid",
			`PatchOptions.meta.k8s.io "" is invalid: force: Forbidden: may not be specified for non-apply patch`},
		{"apply over another manager", "PATCH", path + "pull" + strict, bearer, applyPatch, applied("pull", "e30="), 409, "Conflict",
			`Apply failed with 1 conflict: conflict with "kubectl-create" using v1: .data..dockerconfigjson`},
		{"stale version", "PATCH", path + "pull", bearer, mergePatch, `{"metadata":{"resourceVersion":"1"}}`, 409, "Conflict",
			`Operation cannot be fulfilled on secrets "pull": the object has been modified; please apply your changes to the latest version and try again`},
		{"not JSON", "PATCH", path + "pull", bearer, mergePatch, `{`, 400, "BadRequest", "error decoding patch: "},
		{"another name in the body", "PATCH", path + "pull", bearer, mergePatch, `{"metadata":{"name":"x"}}`, 400, "BadRequest",
			"the name of the object (x) does not match the name on the URL (pull)"},
		{"type", "PATCH", path + "text", bearer, mergePatch, `{"type":"` + pullType + `"}`, 422, "Invalid",
			`Secret "text" is invalid: type: Invalid value: "kubernetes.io/dockerconfigjson": field is immutable`},
		{"immutable", "PATCH", path + "frozen", bearer, mergePatch, `{"data":{".dockerconfigjson":"e30="}}`, 422, "Invalid",
			"Secret \"frozen\" is invalid: data: Forbidden: field is immutable when `immutable` is set"},
		{"config not JSON", "PATCH", path + "pull", bearer, mergePatch, `{"data":{".dockerconfigjson":"eA=="}}`, 422, "Invalid",
			`Secret "pull" is invalid: data[.dockerconfigjson]: Invalid value: "<secret contents redacted>": invalid character 'x' looking for beginning of value`},
		{"config removed", "PATCH", path + "pull", bearer, mergePatch, `{"data":{".dockerconfigjson":null}}`, 422, "Invalid",
			`Secret "pull" is invalid: data[.dockerconfigjson]: Required value`},
		{"bad base64 leaks the Secret", "PATCH", path + "pull", bearer, mergePatch, `{"data":{".dockerconfigjson":"e30=!"}}`, 422, "Invalid",
			` "" is invalid: patch: Invalid value: "{\"kind\":\"Secret\",`},
		{"unknown field leaks the Secret", "PATCH", path + "pull" + strict, bearer, mergePatch, `{"dada":{},"metadata":{"annotation":{}}}`, 422, "Invalid",
			` "" is invalid: patch: Invalid value: "{\"kind\":\"Secret\",`},
		{"too large", "PATCH", path + "pull", bearer, mergePatch, `{"data":{"other":"` + strings.Repeat("AAAA", 1<<20/3+1) + `"}}`, 422, "Invalid",
			`Secret "pull" is invalid: data: Too long: may not be more than 1048576 bytes`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k := cluster()
			before := []map[string]any{k.Secret("prod", "pull"), k.Secret("prod", "text"), k.Secret("prod", "frozen")}
			code, status, raw := send(k, tt.method, tt.target, tt.authorization, tt.contentType, "", tt.body)
			message, _ := status["message"].(string)
			if code != tt.code || status["kind"] != "Status" || status["status"] != "Failure" || status["code"] != float64(code) ||
				status["reason"] != tt.reason || !strings.HasPrefix(message, tt.message) {
				t.Errorf("got %d %s", code, raw)
			}
			if leaks := strings.Contains(raw, "b3RoZXI="); leaks != strings.Contains(tt.name, "leaks") {
				t.Errorf("leak: %t", leaks)
			}
			after := []map[string]any{k.Secret("prod", "pull"), k.Secret("prod", "text"), k.Secret("prod", "frozen")}
			if !reflect.DeepEqual(before, after) || k.Secret("prod", "new") != nil {
				t.Error("a refused request changed the cluster")
			}
		})
	}
}

func TestMergePatchKeepsTheRest(t *testing.T) {
	k := cluster()
	before := k.Secret("prod", "pull")
	const patch = `{"metadata":{"annotations":{"expires":"soon"}},"type":"` + pullType + `","data":{".dockerconfigjson":"e30="}}`
	const partial = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"

	if code, _, raw := send(k, "PATCH", path+"pull"+strict+"&dryRun=All", bearer, mergePatch, partial, patch); code != 200 {
		t.Fatalf("dry run: %d %s", code, raw)
	}
	if !reflect.DeepEqual(k.Secret("prod", "pull"), before) {
		t.Error("the dry run stored something")
	}

	code, answer, raw := send(k, "PATCH", path+"pull"+strict, bearer, mergePatch, partial, patch)
	if code != 200 || answer["kind"] != "PartialObjectMetadata" || strings.Contains(raw, "data\":{\".") {
		t.Errorf("got %d %s", code, raw)
	}
	after := k.Secret("prod", "pull")
	want := maps.Clone(before)
	want["data"] = map[string]any{".dockerconfigjson": "e30=", "other": "b3RoZXI="}
	meta := maps.Clone(before["metadata"].(map[string]any))
	meta["annotations"] = map[string]any{"note": "keep", "expires": "soon"}
	meta["resourceVersion"] = after["metadata"].(map[string]any)["resourceVersion"]
	want["metadata"] = meta
	if !reflect.DeepEqual(after, want) {
		t.Errorf("got %v, want %v", after, want)
	}
	if reflect.DeepEqual(meta["resourceVersion"], before["metadata"].(map[string]any)["resourceVersion"]) {
		t.Error("the resourceVersion did not change")
	}

	if _, answer, _ = send(k, "PATCH", path+"pull"+strict, bearer, mergePatch, "", patch); !reflect.DeepEqual(answer, after) {
		t.Errorf("a patch that changes nothing gave %v, want %v", answer, after)
	}
	if requests := k.Requests(); len(requests) != 3 || string(requests[2].Body) != patch {
		t.Errorf("recorded %v", requests)
	}
}

func TestApplyCreatesByName(t *testing.T) {
	k := cluster()
	const applied = `{"apiVersion":"v1","kind":"Secret","metadata":{"name":"new","labels":{"a":"b"}},"type":"` + pullType +
		`","data":{".dockerconfigjson":"e30="}}`
	code, _, raw := send(k, "PATCH", path+"new"+strict+"&dryRun=All", bearer, applyPatch, "", applied)
	if code != 201 || k.Secret("prod", "new") != nil {
		t.Fatalf("dry run: %d %s", code, raw)
	}
	code, answer, raw := send(k, "PATCH", path+"new"+strict, bearer, applyPatch, "", applied)
	if code != 201 || !reflect.DeepEqual(answer, k.Secret("prod", "new")) {
		t.Fatalf("got %d %s", code, raw)
	}
	if code, again, raw := send(k, "PATCH", path+"new"+strict, bearer, applyPatch, "", applied); code != 200 || !reflect.DeepEqual(again, answer) {
		t.Errorf("second apply: %d %s", code, raw)
	}
	without := strings.Replace(applied, `,"labels":{"a":"b"}`, "", 1)
	code, answer, raw = send(k, "PATCH", path+"new"+strict, bearer, applyPatch, "", without)
	if code != 200 || strings.Contains(raw, "labels") {
		t.Errorf("a label that is applied no longer stays: %d %v", code, answer)
	}
}

func TestServiceAccountRotatesAtomically(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "serviceaccount")
	for _, token := range []string{"one", "two"} {
		if err := WriteServiceAccount(dir, token, "prod", []byte("ca")); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(dir, "token"))
		if err != nil || string(got) != token {
			t.Errorf("got %q, %v", got, err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 5 { // ..data, its folder, three links
		t.Errorf("got %v, %v", entries, err)
	}
}

func TestInterceptSeesNumberAndBody(t *testing.T) {
	ca, err := NewCA()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.Certificate(CertOptions{Hosts: []string{"127.0.0.1"}})
	if err != nil {
		t.Fatal(err)
	}
	e := &ECR{Intercept: func(n int, w http.ResponseWriter, r *http.Request) bool {
		body, _ := io.ReadAll(r.Body)
		w.Write(append(body, byte('0'+n)))
		return n < 3
	}}
	s := Start(e, cert)
	defer s.Close()
	for _, want := range []string{"{}1", "{}2"} {
		resp, err := s.Client().Post(s.URL, "text/plain", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(got) != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	if requests := e.Requests(); len(requests) != 2 || !bytes.Equal(requests[1].Body, []byte("{}")) {
		t.Errorf("recorded %v", requests)
	}
}
