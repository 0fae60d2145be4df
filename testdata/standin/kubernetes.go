package standin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	jsonpatch "github.com/evanphx/json-patch/v5"
)

// Kubernetes stands in for kube-apiserver, with Secrets only: it reads one, merge-patches one (RFC 7386) and applies one
// (server-side apply). Its checks come in kube-apiserver's order: authentication, RBAC, existence, content. It differs from
// the real one in that it reads an applied object as JSON, not as YAML, and shows no metadata.managedFields, although it
// tracks who owns which field.
type Kubernetes struct {
	Intercept Intercept
	Tokens    []string // accepted bearer tokens
	Rules     []Rule   // what their user may do; none: nothing
	User      string   // whom the tokens stand for

	stateMu         sync.Mutex
	namespaces      map[string]map[string]*stored
	resourceVersion int

	recorder
}

// Rule allows verbs on Secrets in a namespace, like a Role bound to the user. Without ResourceNames it allows them on all
// of the namespace's Secrets and on the collection.
type Rule struct {
	Namespace     string
	Verbs         []string
	ResourceNames []string
}

// NewKubernetes returns a cluster with the given namespaces. Its user is the service account ecr-refresher in the first.
func NewKubernetes(namespaces ...string) *Kubernetes {
	k := &Kubernetes{namespaces: map[string]map[string]*stored{}, resourceVersion: 1000}
	for _, namespace := range namespaces {
		k.namespaces[namespace] = map[string]*stored{}
	}
	k.User = "system:serviceaccount:" + append(namespaces, "default")[0] + ":ecr-refresher"
	return k
}

// SetTokens replaces the accepted bearer tokens, also while k serves.
func (k *Kubernetes) SetTokens(tokens ...string) {
	k.stateMu.Lock()
	defer k.stateMu.Unlock()
	k.Tokens = tokens
}

// SetRules replaces the rules, also while k serves.
func (k *Kubernetes) SetRules(rules ...Rule) {
	k.stateMu.Lock()
	defer k.stateMu.Unlock()
	k.Rules = rules
}

// Put stores a Secret, given as its JSON object, as somebody else with all rights would, and fills in the metadata that the
// server fills in. It panics when kube-apiserver would not have accepted the object.
func (k *Kubernetes) Put(namespace, name string, object map[string]any) {
	s, err := decodeSecret(encode(object))
	if err != nil {
		panic(fmt.Sprintf("standin: putting secret %s/%s: %v", namespace, name, err))
	}
	s.Metadata.Name, s.Metadata.Namespace = name, namespace
	k.stateMu.Lock()
	defer k.stateMu.Unlock()
	secrets := k.namespaces[namespace]
	if secrets == nil {
		panic("standin: there is no namespace " + namespace)
	}
	s.fillIn()
	if old := secrets[name]; old != nil {
		s.Metadata.UID, s.Metadata.CreationTimestamp = old.Metadata.UID, old.Metadata.CreationTimestamp
	}
	if errs := s.validate(); errs != nil {
		panic("standin: " + errs.status("", "Secret", name).Message)
	}
	next := &stored{secret: s}
	next.own(owner{manager: "kubectl-create", time: time.Now()}, slices.Collect(maps.Keys(s.fields())))
	k.store(next)
}

// Delete removes a Secret.
func (k *Kubernetes) Delete(namespace, name string) {
	k.stateMu.Lock()
	defer k.stateMu.Unlock()
	delete(k.namespaces[namespace], name)
}

// Secret returns a copy of a Secret as its JSON object, nil when there is none.
func (k *Kubernetes) Secret(namespace, name string) map[string]any {
	k.stateMu.Lock()
	defer k.stateMu.Unlock()
	s := k.namespaces[namespace][name]
	if s == nil {
		return nil
	}
	var object map[string]any
	if err := json.Unmarshal(encode(s.secret), &object); err != nil {
		panic(err)
	}
	return object
}

func (k *Kubernetes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, done := k.begin(w, r, k.Intercept)
	if done {
		return
	}
	w.Header().Set("Audit-Id", newUUID())
	w.Header().Set("Cache-Control", "no-cache, private")
	k.stateMu.Lock()
	defer k.stateMu.Unlock()
	user, status := k.authenticate(r)
	if status != nil {
		status.write(w)
		return
	}
	a, status := k.authorize(user, r)
	if status != nil {
		status.write(w)
		return
	}
	switch {
	case a.name == "" || r.Method != http.MethodGet && r.Method != http.MethodPatch:
		StatusError(w, http.StatusMethodNotAllowed, "MethodNotAllowed", "the server does not allow this method on the requested resource")
	case r.Method == http.MethodGet:
		partial, status := negotiate(r)
		if status == nil && k.namespaces[a.namespace][a.name] == nil {
			status = notFound("secrets", a.name)
		}
		if status != nil {
			status.write(w)
			return
		}
		k.namespaces[a.namespace][a.name].write(w, http.StatusOK, partial)
	default:
		k.patch(w, r, a, body)
	}
}

// authenticate returns the request's user. A request without a bearer token is anonymous, which is not yet an error.
func (k *Kubernetes) authenticate(r *http.Request) (user string, _ *status) {
	scheme, token, _ := strings.Cut(strings.TrimSpace(r.Header.Get("Authorization")), " ")
	switch {
	case !strings.EqualFold(scheme, "Bearer") || token == "":
		return "system:anonymous", nil
	case !slices.Contains(k.Tokens, token):
		return "", newStatus(http.StatusUnauthorized, "Unauthorized", "Unauthorized")
	}
	return k.User, nil
}

// attributes are what RBAC looks at.
type attributes struct{ user, verb, namespace, resource, name string }

func (k *Kubernetes) authorize(user string, r *http.Request) (attributes, *status) {
	parts := strings.Split(strings.TrimSuffix(r.URL.Path, "/"), "/")
	if len(parts) < 6 || len(parts) > 7 || !strings.HasPrefix(r.URL.Path, "/api/v1/namespaces/") {
		s := newStatus(http.StatusForbidden, "Forbidden",
			fmt.Sprintf("forbidden: User %q cannot %s path %q", user, strings.ToLower(r.Method), r.URL.Path))
		s.Details = &details{}
		return attributes{}, s
	}
	a := attributes{user: user, namespace: parts[4], resource: parts[5], verb: map[string]string{
		http.MethodGet: "get", http.MethodPost: "create", http.MethodPut: "update", http.MethodPatch: "patch", http.MethodDelete: "delete",
	}[r.Method]}
	if len(parts) == 7 {
		a.name = parts[6]
	} else if verb, ok := map[string]string{"get": "list", "delete": "deletecollection"}[a.verb]; ok {
		a.verb = verb
	}
	return a, k.allow(a)
}

// allow returns nil when a rule allows a, else the 403.
func (k *Kubernetes) allow(a attributes) *status {
	for _, rule := range k.Rules {
		if a.user == k.User && a.resource == "secrets" && rule.Namespace == a.namespace && slices.Contains(rule.Verbs, a.verb) &&
			(len(rule.ResourceNames) == 0 || slices.Contains(rule.ResourceNames, a.name)) {
			return nil
		}
	}
	subject := a.resource
	if a.name != "" {
		subject += fmt.Sprintf(" %q", a.name)
	}
	s := newStatus(http.StatusForbidden, "Forbidden", fmt.Sprintf("%s is forbidden: User %q cannot %s resource %q in API group %q in the namespace %q",
		subject, a.user, a.verb, a.resource, "", a.namespace))
	s.Details = &details{Name: a.name, Kind: a.resource}
	return s
}

const (
	mergePatch = "application/merge-patch+json"
	applyPatch = "application/apply-patch+yaml"
)

// patch follows PatchResource in
// https://github.com/kubernetes/kubernetes/blob/v1.36.0/staging/src/k8s.io/apiserver/pkg/endpoints/handlers/patch.go.
func (k *Kubernetes) patch(w http.ResponseWriter, r *http.Request, a attributes, body []byte) {
	contentType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if contentType != mergePatch && contentType != applyPatch {
		unsupported := newStatus(http.StatusUnsupportedMediaType, "UnsupportedMediaType", "415: Unsupported Media Type")
		unsupported.Details = &details{}
		unsupported.write(w)
		return
	}
	partial, status := negotiate(r)
	if status == nil && len(body) > maxBody {
		status = newStatus(http.StatusRequestEntityTooLarge, "RequestEntityTooLarge", fmt.Sprintf("Request entity too large: limit is %d", maxBody))
	}
	options := patchOptions{Values: r.URL.Query(), userAgent: r.UserAgent()}
	if status == nil {
		if errs := options.validate(contentType == applyPatch); errs != nil {
			status = errs.status("meta.k8s.io", "PatchOptions", "")
		}
	}
	if status != nil {
		status.write(w)
		return
	}

	live := k.namespaces[a.namespace][a.name]
	var next *stored
	var warnings []string
	if contentType == mergePatch {
		if live == nil {
			notFound("secrets", a.name).write(w)
			return
		}
		next, warnings, status = merge(live, body, options)
	} else {
		next, warnings, status = apply(live, a, body, options)
	}
	if status == nil {
		status = k.admit(live, next, a)
	}
	if status != nil {
		status.write(w)
		return
	}
	for _, warning := range warnings {
		w.Header().Add("Warning", "299 - "+strconv.Quote(warning))
	}
	code := http.StatusOK
	if live == nil {
		code = http.StatusCreated
	}
	if live != nil && bytes.Equal(encode(live.secret), encode(next.secret)) && reflect.DeepEqual(live.owners, next.owners) {
		next = live
	} else if !options.Has("dryRun") {
		k.store(next)
	}
	next.write(w, code, partial)
}

// admit makes the checks on the whole object that follow a patch, in kube-apiserver's order: its identity, the namespace,
// its content, and the right to create it.
func (k *Kubernetes) admit(live, next *stored, a attributes) *status {
	m := &next.Metadata
	switch {
	case live == nil && m.UID != "":
		return conflict(a.name, fmt.Sprintf("uid mismatch: the provided object specified uid %s, and no existing object was found", m.UID))
	case m.Namespace != "" && m.Namespace != a.namespace:
		return badRequest("the namespace of the provided object does not match the namespace sent on the request")
	case m.Name == "":
		return badRequest(fmt.Sprintf("the name of the object (%s based on URL) was undeterminable: name must be provided", a.name))
	case m.Name != a.name:
		return badRequest(fmt.Sprintf("the name of the object (%s) does not match the name on the URL (%s)", m.Name, a.name))
	case k.namespaces[a.namespace] == nil:
		return notFound("namespaces", a.namespace)
	case live != nil && m.ResourceVersion != "" && m.ResourceVersion != live.Metadata.ResourceVersion:
		return conflict(a.name, "the object has been modified; please apply your changes to the latest version and try again")
	}
	m.Namespace = a.namespace
	if live == nil {
		next.fillIn()
		if errs := next.validate(); errs != nil {
			return errs.status("", "Secret", a.name)
		}
		a.verb = "create"
		return k.allow(a)
	}
	m.ResourceVersion = live.Metadata.ResourceVersion
	m.CreationTimestamp = live.Metadata.CreationTimestamp
	if m.UID == "" {
		m.UID = live.Metadata.UID
	}
	if next.Type == "" {
		next.Type = live.Type
	}
	next.mergeStringData()
	if errs := append(next.validateUpdate(live.secret), next.validate()...); errs != nil {
		return errs.status("", "Secret", a.name)
	}
	return nil
}

// store keeps s as the next version.
func (k *Kubernetes) store(s *stored) {
	k.resourceVersion++
	s.Metadata.ResourceVersion = strconv.Itoa(k.resourceVersion)
	k.namespaces[s.Metadata.Namespace][s.Metadata.Name] = s
}

// merge returns what live becomes under a merge patch.
func merge(live *stored, patch []byte, options patchOptions) (*stored, []string, *status) {
	if err := json.Unmarshal(patch, &map[string]any{}); err != nil {
		return nil, nil, badRequest("error decoding patch: " + err.Error())
	}
	if string(bytes.TrimSpace(patch)) == "null" {
		return nil, nil, badRequest("Invalid JSON Patch")
	}
	merged, err := jsonpatch.MergePatch(encode(live.secret), patch)
	if err != nil {
		return nil, nil, badRequest(err.Error())
	}
	// An object that does not decode comes back whole, with everything that the Secret holds.
	invalid := func(detail string) *status {
		return fieldErrors{invalid("patch", string(merged), detail)}.status("", "", "")
	}
	s, err := decodeSecret(merged)
	if err != nil {
		return nil, nil, invalid(err.Error())
	}
	var kind struct{ Kind, APIVersion string }
	if json.Unmarshal(merged, &kind); kind.Kind != "Secret" || kind.APIVersion != "v1" {
		return nil, nil, invalid(fmt.Sprintf("no kind %q is registered for version %q in scheme \"pkg/runtime/scheme.go:111\"", kind.Kind, kind.APIVersion))
	}
	warnings := append(duplicateFields(patch), unknownFields(merged)...)
	switch {
	case options.Get("fieldValidation") == "Ignore":
		warnings = nil
	case options.Get("fieldValidation") == "Strict" && warnings != nil:
		return nil, nil, invalid("strict decoding error: " + strings.Join(warnings, ", "))
	}
	next := &stored{secret: s, owners: cloneOwners(live.owners)}
	s.mergeStringData()
	before, after := live.fields(), s.fields()
	var changed []field
	for f, value := range after {
		if old, ok := before[f]; !ok || old != value {
			changed = append(changed, f)
		}
	}
	for f := range before {
		if _, ok := after[f]; !ok {
			next.disown(f)
		}
	}
	for _, f := range changed {
		next.disown(f)
	}
	next.own(owner{manager: options.manager(), time: time.Now()}, changed)
	return next, warnings, nil
}

// apply returns what live, nil when there is none, becomes when the object in body is applied to it. See
// https://kubernetes.io/docs/reference/using-api/server-side-apply/.
func apply(live *stored, a attributes, body []byte, options patchOptions) (*stored, []string, *status) {
	var generic map[string]any
	if err := json.Unmarshal(body, &generic); err != nil && len(body) > 0 { // no YAML is the empty object
		return nil, nil, badRequest("error decoding YAML: error unmarshaling JSON: while decoding JSON: " + err.Error())
	}
	apiVersion, _ := generic["apiVersion"].(string)
	kind, _ := generic["kind"].(string)
	if apiVersion != "v1" || kind != "Secret" {
		return nil, nil, badRequest(fmt.Sprintf("invalid object type: /%s, Kind=%s", apiVersion, kind))
	}
	var named secret
	json.Unmarshal(body, &named) // for the messages; a fault is found below
	object := fmt.Sprintf("%s/%s; /v1, Kind=Secret", named.Metadata.Namespace, named.Metadata.Name)
	if unknown := unknownFields(body); unknown != nil {
		name := strings.Trim(strings.TrimPrefix(unknown[0], "unknown field "), `"`)
		return nil, nil, internalError(fmt.Sprintf("failed to create typed patch object (%s): .%s: field not declared in schema", object, name))
	}
	applied, err := decodeSecret(body)
	if err != nil {
		return nil, nil, internalError(fmt.Sprintf("failed to convert new object (%s) to proper version: unable to convert unstructured object "+
			"to /v1, Kind=Secret: error decoding from json: %v", object, err))
	}
	applied.mergeStringData()
	config := applied.fields()

	next := &stored{secret: &secret{Kind: "Secret", APIVersion: "v1"}}
	if live != nil {
		if next.secret, err = decodeSecret(encode(live.secret)); err != nil {
			panic(err)
		}
		next.owners = cloneOwners(live.owners)
	}
	if m := applied.Metadata; live == nil || m.Name != "" {
		next.Metadata.Name = m.Name
	}
	if m := applied.Metadata; m.Namespace != "" {
		next.Metadata.Namespace = m.Namespace
	}
	if m := applied.Metadata; m.UID != "" {
		next.Metadata.UID = m.UID
	}
	if m := applied.Metadata; m.ResourceVersion != "" {
		next.Metadata.ResourceVersion = m.ResourceVersion
	}

	me := owner{manager: options.manager(), apply: true, time: time.Now()}
	var conflicts []cause
	before := next.fields()
	for _, f := range sortedFields(config) {
		old, exists := before[f]
		for _, o := range next.owners {
			if exists && old != config[f] && o.fields[f] && !o.is(me) {
				conflicts = append(conflicts, cause{Reason: "FieldManagerConflict", Message: "conflict with " + o.String(), Field: f.String()})
			}
		}
	}
	if len(conflicts) > 0 && options.Get("force") != "true" {
		s := newStatus(http.StatusConflict, "Conflict", conflictMessage(conflicts))
		s.Details = &details{Causes: conflicts}
		return nil, nil, s
	}
	for f, value := range config {
		if old, exists := before[f]; exists && old != value {
			for _, o := range next.owners {
				if !o.is(me) {
					delete(o.fields, f)
				}
			}
		}
		next.set(f, value)
	}
	if i := slices.IndexFunc(next.owners, me.is); i >= 0 {
		stale := next.owners[i].fields
		me.time = next.owners[i].time
		next.owners[i].fields = map[field]bool{}
		for f := range stale { // what this manager applied before and applies no longer goes, unless it has another owner
			if _, ok := config[f]; !ok && !slices.ContainsFunc(next.owners, func(o owner) bool { return o.fields[f] }) {
				next.unset(f)
			}
		}
	}
	next.own(me, slices.Collect(maps.Keys(config)))

	warnings := duplicateFields(body)
	switch {
	case options.Get("fieldValidation") == "Ignore":
		warnings = nil
	case options.Get("fieldValidation") == "Strict" && warnings != nil:
		return nil, nil, badRequest("error strict decoding YAML: " + strings.Join(warnings, ", "))
	}
	return next, warnings, nil
}

func conflictMessage(conflicts []cause) string {
	if len(conflicts) == 1 {
		return fmt.Sprintf("Apply failed with 1 conflict: %s: %s", conflicts[0].Message, conflicts[0].Field)
	}
	byManager := map[string][]string{}
	for _, c := range conflicts {
		byManager[c.Message] = append(byManager[c.Message], "- "+c.Field)
	}
	var lines []string
	for _, message := range slices.Sorted(maps.Keys(byManager)) {
		lines = append(lines, strings.Replace(message, "conflict", "conflicts", 1)+":")
		lines = append(lines, byManager[message]...)
	}
	return fmt.Sprintf("Apply failed with %d conflicts: %s", len(conflicts), strings.Join(lines, "\n"))
}

// patchOptions is a patch's query.
type patchOptions struct {
	url.Values
	userAgent string
}

// manager names who owns the fields that the patch changes.
func (o patchOptions) manager() string {
	if manager := o.Get("fieldManager"); manager != "" {
		return manager
	}
	prefix, _, _ := strings.Cut(o.userAgent, "/")
	return prefix
}

func (o patchOptions) validate(apply bool) (errs fieldErrors) {
	if apply && o.Get("fieldManager") == "" {
		errs = append(errs, cause{"FieldValueRequired", "Required value: is required for apply patch", "fieldManager"})
	}
	if !apply && o.Has("force") {
		errs = append(errs, cause{"FieldValueForbidden", "Forbidden: may not be specified for non-apply patch", "force"})
	}
	if len(o.Get("fieldManager")) > 128 {
		errs = append(errs, cause{"FieldValueTooLong", "Too long: may not be more than 128 bytes", "fieldManager"})
	}
	for _, value := range o.Values["dryRun"] {
		if value != "All" {
			errs = append(errs, cause{"FieldValueNotSupported", fmt.Sprintf(`Unsupported value: %s: supported values: "All"`, encode(o.Values["dryRun"])), "dryRun"})
			break
		}
	}
	if value := o.Get("fieldValidation"); !slices.Contains([]string{"", "Ignore", "Warn", "Strict"}, value) {
		errs = append(errs, cause{"FieldValueNotSupported",
			fmt.Sprintf(`Unsupported value: %q: supported values: "", "Ignore", "Strict", "Warn"`, value), "fieldValidation"})
	}
	return errs
}

// secret is a Secret in its wire form, the fields in the order in which kube-apiserver writes them.
type secret struct {
	Kind       string            `json:"kind"`
	APIVersion string            `json:"apiVersion"`
	Metadata   objectMeta        `json:"metadata"`
	Immutable  *bool             `json:"immutable,omitempty"`
	Data       map[string][]byte `json:"data,omitempty"`
	StringData map[string]string `json:"stringData,omitempty"`
	Type       string            `json:"type,omitempty"`
}

type objectMeta struct {
	Name              string            `json:"name,omitempty"`
	GenerateName      string            `json:"generateName,omitempty"`
	Namespace         string            `json:"namespace,omitempty"`
	UID               string            `json:"uid,omitempty"`
	ResourceVersion   string            `json:"resourceVersion,omitempty"`
	Generation        int64             `json:"generation,omitempty"`
	CreationTimestamp string            `json:"creationTimestamp,omitempty"`
	Labels            map[string]string `json:"labels,omitempty"`
	Annotations       map[string]string `json:"annotations,omitempty"`
	OwnerReferences   []any             `json:"ownerReferences,omitempty"`
	Finalizers        []string          `json:"finalizers,omitempty"`
	ManagedFields     []any             `json:"managedFields,omitempty"`
}

// decodeSecret ignores unknown fields, which unknownFields finds.
func decodeSecret(object []byte) (*secret, error) {
	s := &secret{}
	if err := json.Unmarshal(object, s); err != nil {
		// The message names the Go type, which in kube-apiserver is exported.
		return nil, errors.New(strings.Replace(err.Error(), "struct field secret.", "struct field Secret.", 1))
	}
	s.Kind, s.APIVersion = "Secret", "v1"
	s.Metadata.ManagedFields = nil
	return s, nil
}

// mergeStringData moves the write-only stringData into data.
func (s *secret) mergeStringData() {
	for key, value := range s.StringData {
		if s.Data == nil {
			s.Data = map[string][]byte{}
		}
		s.Data[key] = []byte(value)
	}
	s.StringData = nil
}

// fillIn sets what the server sets when it creates an object.
func (s *secret) fillIn() {
	s.mergeStringData()
	if s.Type == "" {
		s.Type = "Opaque"
	}
	s.Metadata.UID = newUUID()
	s.Metadata.ResourceVersion = ""
	s.Metadata.CreationTimestamp = time.Now().UTC().Format(time.RFC3339)
}

var (
	dataKey       = regexp.MustCompile(`^[-._a-zA-Z0-9]+$`)
	qualifiedName = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]$`)
	labelValue    = regexp.MustCompile(`^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$`)
	subdomain     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
)

const (
	maxSecretSize     = 1 << 20   // bytes of data
	maxAnnotationSize = 256 << 10 // bytes of keys and values
)

// validate is ValidateSecret in https://github.com/kubernetes/kubernetes/blob/v1.36.0/pkg/apis/core/validation/validation.go.
func (s *secret) validate() (errs fieldErrors) {
	if !subdomain.MatchString(s.Metadata.Name) || len(s.Metadata.Name) > 253 {
		errs = append(errs, invalid("metadata.name", s.Metadata.Name, "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric "+
			"characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation "+
			`is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')`))
	}
	for _, m := range []struct {
		path   string
		values map[string]string
	}{{"metadata.labels", s.Metadata.Labels}, {"metadata.annotations", s.Metadata.Annotations}} {
		size := 0
		for _, key := range slices.Sorted(maps.Keys(m.values)) {
			size += len(key) + len(m.values[key])
			if !qualifiedName.MatchString(key) {
				errs = append(errs, invalid(m.path, key, "name part must consist of alphanumeric characters, '-', '_' or '.', and must start "+
					"and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "+
					"'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"))
			}
		}
		if size > maxAnnotationSize && m.path == "metadata.annotations" {
			errs = append(errs, cause{"FieldValueTooLong", fmt.Sprintf("Too long: may not be more than %d bytes", maxAnnotationSize), m.path})
		}
	}
	for _, key := range slices.Sorted(maps.Keys(s.Metadata.Labels)) {
		if value := s.Metadata.Labels[key]; !labelValue.MatchString(value) {
			errs = append(errs, invalid("metadata.labels", value, "a valid label must be an empty string or consist of alphanumeric characters, "+
				"'-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used "+
				"for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"))
		}
	}
	size := 0
	for _, key := range slices.Sorted(maps.Keys(s.Data)) {
		size += len(s.Data[key])
		if !dataKey.MatchString(key) {
			errs = append(errs, invalid("data["+key+"]", key, "a valid config key must consist of alphanumeric characters, '-', '_' or '.' "+
				"(e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"))
		}
	}
	if size > maxSecretSize {
		errs = append(errs, cause{"FieldValueTooLong", fmt.Sprintf("Too long: may not be more than %d bytes", maxSecretSize), "data"})
	}
	if s.Type == "kubernetes.io/dockerconfigjson" {
		config, ok := s.Data[".dockerconfigjson"]
		if !ok {
			errs = append(errs, cause{"FieldValueRequired", "Required value", "data[.dockerconfigjson]"})
		} else if err := json.Unmarshal(config, &map[string]any{}); err != nil {
			errs = append(errs, invalid("data[.dockerconfigjson]", "<secret contents redacted>", err.Error()))
		}
	}
	return errs
}

func (s *secret) validateUpdate(old *secret) (errs fieldErrors) {
	if s.Metadata.UID != old.Metadata.UID {
		errs = append(errs, invalid("metadata.uid", s.Metadata.UID, "field is immutable"))
	}
	if s.Type != old.Type {
		errs = append(errs, invalid("type", s.Type, "field is immutable"))
	}
	if old.Immutable != nil && *old.Immutable {
		const detail = "Forbidden: field is immutable when `immutable` is set"
		if s.Immutable == nil || !*s.Immutable {
			errs = append(errs, cause{"FieldValueForbidden", detail, "immutable"})
		}
		if !reflect.DeepEqual(s.Data, old.Data) {
			errs = append(errs, cause{"FieldValueForbidden", detail, "data"})
		}
	}
	return errs
}

// field is a part of a Secret that has owners of its own: a key of a section that is a map, or a section that is a value.
type field struct{ section, key string }

// String returns the field's path as conflicts show it: .data..dockerconfigjson.
func (f field) String() string {
	if f.key == "" {
		return "." + f.section
	}
	return "." + f.section + "." + f.key
}

func sortedFields(values map[field]string) []field {
	return slices.SortedFunc(maps.Keys(values), func(a, b field) int { return strings.Compare(a.String(), b.String()) })
}

// fields returns all fields with their values.
func (s *secret) fields() map[field]string {
	values := map[field]string{}
	for key, value := range s.Data {
		values[field{"data", key}] = string(value)
	}
	for key, value := range s.Metadata.Labels {
		values[field{"metadata.labels", key}] = value
	}
	for key, value := range s.Metadata.Annotations {
		values[field{"metadata.annotations", key}] = value
	}
	if s.Type != "" {
		values[field{"type", ""}] = s.Type
	}
	if s.Immutable != nil {
		values[field{"immutable", ""}] = strconv.FormatBool(*s.Immutable)
	}
	return values
}

func (s *secret) set(f field, value string) {
	switch f.section {
	case "data":
		if s.Data == nil {
			s.Data = map[string][]byte{}
		}
		s.Data[f.key] = []byte(value)
	case "metadata.labels":
		if s.Metadata.Labels == nil {
			s.Metadata.Labels = map[string]string{}
		}
		s.Metadata.Labels[f.key] = value
	case "metadata.annotations":
		if s.Metadata.Annotations == nil {
			s.Metadata.Annotations = map[string]string{}
		}
		s.Metadata.Annotations[f.key] = value
	case "type":
		s.Type = value
	case "immutable":
		immutable := value == "true"
		s.Immutable = &immutable
	}
}

func (s *secret) unset(f field) {
	switch f.section {
	case "data":
		delete(s.Data, f.key)
	case "metadata.labels":
		delete(s.Metadata.Labels, f.key)
	case "metadata.annotations":
		delete(s.Metadata.Annotations, f.key)
	case "type":
		s.Type = ""
	case "immutable":
		s.Immutable = nil
	}
}

// stored is a Secret with the owners of its fields.
type stored struct {
	*secret
	owners []owner
}

// owner is one entry of managedFields: a manager, how it wrote (Apply or Update), and what.
type owner struct {
	manager string
	apply   bool
	time    time.Time
	fields  map[field]bool
}

func (o owner) is(other owner) bool { return o.manager == other.manager && o.apply == other.apply }

func (o owner) String() string {
	if o.apply {
		return strconv.Quote(o.manager)
	}
	return strconv.Quote(o.manager) + " using v1"
}

func cloneOwners(owners []owner) []owner {
	owners = slices.Clone(owners)
	for i := range owners {
		owners[i].fields = maps.Clone(owners[i].fields)
	}
	return owners
}

// own adds fields to those of o.
func (s *stored) own(o owner, fields []field) {
	if len(fields) == 0 {
		return
	}
	i := slices.IndexFunc(s.owners, o.is)
	if i < 0 {
		i = len(s.owners)
		s.owners = append(s.owners, owner{manager: o.manager, apply: o.apply, fields: map[field]bool{}})
	}
	s.owners[i].time = o.time
	for _, f := range fields {
		s.owners[i].fields[f] = true
	}
}

// disown takes f from all owners.
func (s *stored) disown(f field) {
	for i := range s.owners {
		delete(s.owners[i].fields, f)
	}
	s.owners = slices.DeleteFunc(s.owners, func(o owner) bool { return len(o.fields) == 0 })
}

// write answers with the Secret, or with its metadata alone.
func (s *stored) write(w http.ResponseWriter, code int, partial bool) {
	var object any = s.secret
	if partial {
		object = struct {
			Kind       string     `json:"kind"`
			APIVersion string     `json:"apiVersion"`
			Metadata   objectMeta `json:"metadata"`
		}{"PartialObjectMetadata", "meta.k8s.io/v1", s.Metadata}
	}
	writeJSON(w, code, object)
}

// negotiate tells whether r wants the object's metadata alone; when it accepts nothing that the server has, 406.
func negotiate(r *http.Request) (partial bool, _ *status) {
	accept := strings.Join(r.Header.Values("Accept"), ",")
	if accept == "" {
		return false, nil
	}
	for _, clause := range strings.Split(accept, ",") {
		mediaType, params, err := mime.ParseMediaType(clause)
		if err != nil || !slices.Contains([]string{"application/json", "application/*", "*/*"}, mediaType) {
			continue
		}
		switch {
		case params["as"] == "":
			return false, nil
		case params["as"] == "PartialObjectMetadata" && params["g"] == "meta.k8s.io" && params["v"] == "v1":
			return true, nil
		}
	}
	s := newStatus(http.StatusNotAcceptable, "NotAcceptable", "406: Not Acceptable\n\nAvailable representations: application/json, "+
		"application/yaml, application/vnd.kubernetes.protobuf")
	s.Details = &details{}
	return false, s
}

// unknownFields lists, in the words of a strict decoding error, the fields of a Secret's JSON that a Secret does not have.
func unknownFields(object []byte) (errs []string) {
	var top map[string]json.RawMessage
	if json.Unmarshal(object, &top) != nil {
		return nil
	}
	var metadata map[string]json.RawMessage
	json.Unmarshal(top["metadata"], &metadata)
	for _, level := range []struct {
		prefix string
		keys   map[string]json.RawMessage
		known  reflect.Type
	}{{"", top, reflect.TypeFor[secret]()}, {"metadata.", metadata, reflect.TypeFor[objectMeta]()}} {
		known := map[string]bool{"metadata.selfLink": true, "metadata.deletionTimestamp": true, "metadata.deletionGracePeriodSeconds": true}
		for f := range level.known.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			known[level.prefix+name] = true
		}
		for _, key := range slices.Sorted(maps.Keys(level.keys)) {
			if !known[level.prefix+key] {
				errs = append(errs, fmt.Sprintf("unknown field %q", level.prefix+key))
			}
		}
	}
	return errs
}

// duplicateFields lists, in the words of a strict decoding error, the keys that occur twice in one object of a JSON text.
func duplicateFields(text []byte) (errs []string) {
	d := json.NewDecoder(bytes.NewReader(text))
	var value func(path string) error
	value = func(path string) error {
		token, err := d.Token()
		if err != nil {
			return err
		}
		delim, ok := token.(json.Delim)
		if !ok {
			return nil
		}
		seen := map[string]bool{}
		for i := 0; d.More(); i++ {
			next := fmt.Sprintf("%s[%d]", path, i)
			if delim == '{' {
				key, err := d.Token()
				if err != nil {
					return err
				}
				next = strings.TrimPrefix(path+"."+key.(string), ".")
				if seen[next] {
					errs = append(errs, fmt.Sprintf("duplicate field %q", next))
				}
				seen[next] = true
			}
			if err := value(next); err != nil {
				return err
			}
		}
		_, err = d.Token()
		return err
	}
	value("")
	return errs
}

// status is metav1.Status, the body of every failure.
type status struct {
	Kind       string   `json:"kind"`
	APIVersion string   `json:"apiVersion"`
	Metadata   struct{} `json:"metadata"`
	Status     string   `json:"status"`
	Message    string   `json:"message,omitempty"`
	Reason     string   `json:"reason,omitempty"`
	Details    *details `json:"details,omitempty"`
	Code       int      `json:"code"`
}

type details struct {
	Name   string  `json:"name,omitempty"`
	Group  string  `json:"group,omitempty"`
	Kind   string  `json:"kind,omitempty"`
	Causes []cause `json:"causes,omitempty"`
}

type cause struct {
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	Field   string `json:"field,omitempty"`
}

// StatusError answers as kube-apiserver does when it fails, without details.
func StatusError(w http.ResponseWriter, code int, reason, message string) {
	newStatus(code, reason, message).write(w)
}

func newStatus(code int, reason, message string) *status {
	return &status{Kind: "Status", APIVersion: "v1", Status: "Failure", Message: message, Reason: reason, Code: code}
}

func (s *status) write(w http.ResponseWriter) { writeJSON(w, s.Code, s) }

func badRequest(message string) *status {
	return newStatus(http.StatusBadRequest, "BadRequest", message)
}

// internalError is what a plain Go error becomes: it has no reason.
func internalError(message string) *status {
	return newStatus(http.StatusInternalServerError, "", message)
}

func notFound(resource, name string) *status {
	s := newStatus(http.StatusNotFound, "NotFound", fmt.Sprintf("%s %q not found", resource, name))
	s.Details = &details{Name: name, Kind: resource}
	return s
}

func conflict(name, message string) *status {
	s := newStatus(http.StatusConflict, "Conflict", fmt.Sprintf("Operation cannot be fulfilled on secrets %q: %s", name, message))
	s.Details = &details{Name: name, Kind: "secrets"}
	return s
}

// fieldErrors are the causes of a 422.
type fieldErrors []cause

func invalid(path, value, detail string) cause {
	return cause{"FieldValueInvalid", fmt.Sprintf("Invalid value: %q: %s", value, detail), path}
}

func (errs fieldErrors) status(group, kind, name string) *status {
	var messages []string
	for _, c := range errs {
		messages = append(messages, c.Field+": "+c.Message)
	}
	message := strings.Join(messages, ", ")
	if len(messages) > 1 {
		message = "[" + message + "]"
	}
	qualified := kind
	if group != "" {
		qualified += "." + group
	}
	s := newStatus(http.StatusUnprocessableEntity, "Invalid", fmt.Sprintf("%s %q is invalid: %s", qualified, name, message))
	s.Details = &details{Name: name, Group: group, Kind: kind, Causes: errs}
	return s
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v)
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}
