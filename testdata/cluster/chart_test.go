package cluster

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	serializer "k8s.io/apimachinery/pkg/runtime/serializer/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

// knobs is what each value does. A check reads "KIND PATH = JSON", "KIND PATH
// has JSON" for a list, or "KIND PATH absent"; KIND is that of an object, Pods
// for all three pod specs, Templates for what they stand in, or All.
var knobs = []struct {
	values string
	checks []string
}{
	{`{}`, []string{
		`CronJob metadata.name = "pull-ecr-refresher"`,
		`Job metadata.name = "pull-ecr-refresher-refresh"`,
		`Pod metadata.name = "pull-ecr-refresher-dry-run"`,
		`ServiceAccount metadata.name = "pull-ecr-refresher-serviceaccount"`,
		`ServiceAccount automountServiceAccountToken = false`,
		`Pods automountServiceAccountToken = true`,
		`Role metadata.name = "pull-ecr-refresher-update-role"`,
		`Role rules = [{"apiGroups":[""],"resources":["secrets"],"resourceNames":["pull-ecr-refresher-credentials"],"verbs":["patch","create"]}]`,
		`RoleBinding metadata.name = "pull-ecr-refresher-rolebinder"`,
		`Secret absent`, `ClusterRole absent`, `ClusterRoleBinding absent`,
		`Job metadata.annotations = {"helm.sh/hook":"post-install,post-upgrade","helm.sh/hook-delete-policy":"before-hook-creation,hook-succeeded","helm.sh/hook-output-log-policy":"hook-failed"}`,
		`Pods containers.0.terminationMessagePolicy = "FallbackToLogsOnError"`,
		`Pods restartPolicy = "Never"`,
		`CronJob spec.jobTemplate.spec.podFailurePolicy.rules.1.onExitCodes = {"containerName":"ecr-refresher","operator":"In","values":[2]}`,
		`CronJob spec.jobTemplate.spec.podFailurePolicy.rules.0 = {"action":"Ignore","onPodConditions":[{"type":"DisruptionTarget","status":"True"}]}`,
	}},
	{`{global: {a: b}}`, []string{`CronJob metadata.name = "pull-ecr-refresher"`}},
	{`{nameOverride: x}`, []string{`CronJob metadata.name = "pull-x"`, `Pods containers.0.args has "--secret=pull-x-credentials"`}},
	{`{fullnameOverride: x}`, []string{`CronJob metadata.name = "x"`, `Pods serviceAccountName = "x-serviceaccount"`}},
	{`{commonLabels: {team: a}}`, []string{`All metadata.labels.team = "a"`, `Templates metadata.labels.team = "a"`}},

	{`{image: {repository: r.example/x}}`, []string{`Pods containers.0.image = "r.example/x:0.1.0"`}},
	{`{image: {repository: x, tag: "1.20"}}`, []string{`Pods containers.0.image = "x:1.20"`}},
	{`{image: {repository: x, tag: z, digest: "sha256:` + digest + `"}}`, []string{`Pods containers.0.image = "x@sha256:` + digest + `"`}},
	{`{image: {pullPolicy: Always}}`, []string{`Pods containers.0.imagePullPolicy = "Always"`}},
	{`{image: {pullPolicy: null}}`, []string{`Pods containers.0.imagePullPolicy absent`}},
	{`{image: {pullSecrets: [{name: a}]}}`, []string{`Pods imagePullSecrets = [{"name":"a"}]`}},

	{`{cronJob: {schedule: "5,35 * * * *"}}`, []string{`CronJob spec.schedule = "5,35 * * * *"`}},
	{`{cronJob: {timeZone: Europe/Berlin}}`, []string{`CronJob spec.timeZone = "Europe/Berlin"`}},
	{`{cronJob: {suspend: true}}`, []string{`CronJob spec.suspend = true`}},
	{`{cronJob: {suspend: false}}`, []string{`CronJob spec.suspend = false`}},
	{`{cronJob: {suspend: null}}`, []string{`CronJob spec.suspend absent`}},
	{`{cronJob: {concurrencyPolicy: Replace}}`, []string{`CronJob spec.concurrencyPolicy = "Replace"`}},
	{`{cronJob: {startingDeadlineSeconds: 0}}`, []string{`CronJob spec.startingDeadlineSeconds = 0`}},
	{`{cronJob: {startingDeadlineSeconds: 1000000}}`, []string{`CronJob spec.startingDeadlineSeconds = 1000000`}},
	{`{cronJob: {startingDeadlineSeconds: null}}`, []string{`CronJob spec.startingDeadlineSeconds absent`}},
	{`{cronJob: {successfulJobsHistoryLimit: 0}}`, []string{`CronJob spec.successfulJobsHistoryLimit = 0`}},
	{`{cronJob: {failedJobsHistoryLimit: 0}}`, []string{`CronJob spec.failedJobsHistoryLimit = 0`}},
	{`{cronJob: {activeDeadlineSeconds: 7}}`, []string{`CronJob spec.jobTemplate.spec.activeDeadlineSeconds = 7`, `Job spec.activeDeadlineSeconds = 7`}},
	{`{cronJob: {activeDeadlineSeconds: null}}`, []string{`CronJob spec.jobTemplate.spec.activeDeadlineSeconds absent`, `Job spec.activeDeadlineSeconds absent`}},
	{`{cronJob: {backoffLimit: 0}}`, []string{`CronJob spec.jobTemplate.spec.backoffLimit = 0`, `Job spec.backoffLimit = 0`}},
	{`{cronJob: {ttlSecondsAfterFinished: 0}}`, []string{`CronJob spec.jobTemplate.spec.ttlSecondsAfterFinished = 0`, `Job spec.ttlSecondsAfterFinished absent`}},
	{`{cronJob: {ttlSecondsAfterFinished: null}}`, []string{`CronJob spec.jobTemplate.spec.ttlSecondsAfterFinished absent`}},

	{`{refreshOnInstall: false}`, []string{`Job absent`, `CronJob metadata.name = "pull-ecr-refresher"`}},
	{`{imagePullSecret: {name: x}}`, []string{`Pods containers.0.args has "--secret=x"`, `Role rules.0.resourceNames = ["x"]`}},
	{`{imagePullSecret: {namespace: other}}`, []string{`Pods containers.0.args has "--namespace=other"`, `Role metadata.namespace = "other"`,
		`RoleBinding metadata.namespace = "other"`, `RoleBinding subjects.0.namespace = "NAMESPACE"`, `CronJob metadata.namespace = "NAMESPACE"`}},
	{`{imagePullSecret: {create: false}}`, []string{`Role rules.0.verbs = ["patch"]`}},

	{`{registries: [a.example, "https://b.example/"]}`, []string{`Pods containers.0.args has "--registry=a.example"`, `Pods containers.0.args has "--registry=https://b.example/"`}},
	{`{region: us-east-1}`, []string{`Pods containers.0.args has "--region=us-east-1"`}},
	{`{timeout: 1m30s}`, []string{`Pods containers.0.args has "--timeout=1m30s"`}},
	{`{logFormat: json}`, []string{`Pods containers.0.args has "--log-format=json"`}},
	{`{timeout: null, logFormat: null}`, []string{`CronJob spec.jobTemplate.spec.template.spec.containers.0.args = ["--secret=pull-ecr-refresher-credentials"]`}},
	{`{extraArgs: ["--dry-run=true"]}`, []string{`Pods containers.0.args has "--dry-run=true"`}},

	{`{aws: {accessKeyID: AKIA, secretAccessKey: "s/+="}}`, []string{
		`Secret metadata.name = "pull-ecr-refresher-env-secret"`, `Secret type = "Opaque"`,
		`Secret data = {"AWS_ACCESS_KEY_ID":"QUtJQQ==","AWS_SECRET_ACCESS_KEY":"cy8rPQ=="}`,
		`Pods containers.0.env = [{"name":"AWS_ACCESS_KEY_ID","valueFrom":{"secretKeyRef":{"name":"pull-ecr-refresher-env-secret","key":"AWS_ACCESS_KEY_ID"}}},` +
			`{"name":"AWS_SECRET_ACCESS_KEY","valueFrom":{"secretKeyRef":{"name":"pull-ecr-refresher-env-secret","key":"AWS_SECRET_ACCESS_KEY"}}}]`}},
	{`{aws: {existingSecret: keys}}`, []string{`Secret absent`,
		`Pods containers.0.env has {"name":"AWS_ACCESS_KEY_ID","valueFrom":{"secretKeyRef":{"name":"keys","key":"AWS_ACCESS_KEY_ID"}}}`,
		`Pods containers.0.env has {"name":"AWS_SESSION_TOKEN","valueFrom":{"secretKeyRef":{"name":"keys","key":"AWS_SESSION_TOKEN","optional":true}}}`}},
	{`{aws: {roleArn: "arn:aws:iam::123456789012:role/x"}}`, []string{
		`Pods containers.0.env has {"name":"AWS_ROLE_ARN","value":"arn:aws:iam::123456789012:role/x"}`,
		`Pods volumes.0.projected.sources.0.serviceAccountToken.audience = "sts.amazonaws.com"`}},
	{`{aws: {assumeRoleArn: "arn:aws:iam::123456789012:role/x"}}`, []string{`Pods containers.0.args has "--assume-role-arn=arn:aws:iam::123456789012:role/x"`}},

	{`{serviceAccount: {create: false, name: x}}`, []string{`ServiceAccount absent`, `Pods serviceAccountName = "x"`, `RoleBinding subjects.0.name = "x"`}},
	{`{serviceAccount: {name: x, annotations: {a: b}, labels: {c: d}}}`, []string{`ServiceAccount metadata.name = "x"`,
		`ServiceAccount metadata.annotations = {"a":"b"}`, `ServiceAccount metadata.labels.c = "d"`}},
	{`{rbac: {create: false}}`, []string{`Role absent`, `RoleBinding absent`}},

	{`{podAnnotations: {a: b}, podLabels: {c: d}}`, []string{`Templates metadata.annotations.a = "b"`, `Templates metadata.labels.c = "d"`}},
	{`{podSecurityContext: {runAsUser: 0, runAsNonRoot: false}}`, []string{`Pods securityContext.runAsUser = 0`, `Pods securityContext.runAsNonRoot = false`}},
	{`{podSecurityContext: {runAsUser: null}}`, []string{`Pods securityContext.runAsUser absent`, `Pods securityContext.runAsGroup = 65532`}},
	{`{podSecurityContext: null}`, []string{`Pods securityContext absent`}},
	{`{securityContext: {readOnlyRootFilesystem: false}}`, []string{`Pods containers.0.securityContext.readOnlyRootFilesystem = false`}},
	{`{securityContext: null}`, []string{`Pods containers.0.securityContext absent`}},
	{`{resources: {limits: {memory: 16Mi, cpu: 1}}}`, []string{`Pods containers.0.resources.limits.memory = "16Mi"`, `Pods containers.0.resources.limits.cpu = 1`}},
	{`{resources: null}`, []string{`Pods containers.0.resources absent`}},
	{`{nodeSelector: {a: b}}`, []string{`Pods nodeSelector = {"a":"b"}`}},
	{`{tolerations: [{key: a, operator: Exists, tolerationSeconds: 0, effect: NoExecute}]}`, []string{`Pods tolerations.0.tolerationSeconds = 0`}},
	{`{affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 1, preference: {matchFields: [{key: metadata.name, operator: In, values: [a]}]}}]}}}`,
		[]string{`Pods affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution.0.weight = 1`}},
	{`{topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: DoNotSchedule}]}`, []string{`Pods topologySpreadConstraints.0.maxSkew = 1`}},
	{`{priorityClassName: system-node-critical}`, []string{`Pods priorityClassName = "system-node-critical"`}},
	{`{extraEnv: [{name: A, value: ""}]}`, []string{`Pods containers.0.env.0.name = "A"`}},
	{`{envFrom: [{secretRef: {name: a, optional: false}}]}`, []string{`Pods containers.0.envFrom.0.secretRef.optional = false`}},
	{`{extraVolumes: [{name: a, emptyDir: {}}], extraVolumeMounts: [{name: a, mountPath: /a}]}`, []string{
		`Pods volumes = [{"name":"a","emptyDir":{}}]`, `Pods containers.0.volumeMounts = [{"name":"a","mountPath":"/a"}]`}},
	{`{hostAliases: [{ip: 127.0.0.1, hostnames: [a]}]}`, []string{`Pods hostAliases.0.ip = "127.0.0.1"`}},
}

const digest = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestEveryValueIsRenderedAndDecodesStrictly(t *testing.T) {
	withHelms(t, func(e *environment) {
		for _, k := range knobs {
			objects := e.render(k.values)
			for _, check := range k.checks {
				check = strings.ReplaceAll(check, "NAMESPACE", e.namespace)
				if err := objects.check(check); err != nil {
					e.Errorf("%s: %s: %v", k.values, check, err)
				}
			}
		}
	})
}

func TestEveryValueHasACase(t *testing.T) {
	covered := make(map[string]bool)
	for _, k := range knobs {
		var values map[string]any
		if err := yaml.Unmarshal([]byte(k.values), &values); err != nil {
			t.Fatalf("%s: %v", k.values, err)
		}
		for _, path := range leaves("", values) {
			for ; path != ""; path = path[:max(0, strings.LastIndex(path, "."))] {
				covered[path] = true
			}
		}
	}
	data, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var defaults map[string]any
	if err := yaml.Unmarshal(data, &defaults); err != nil {
		t.Fatal(err)
	}
	for _, free := range []string{"podSecurityContext", "securityContext", "resources"} { // fields of Kubernetes, not of the chart
		defaults[free] = nil
	}
	for _, path := range leaves("", defaults) {
		if !covered[path] {
			t.Errorf("no case sets %s", path)
		}
	}
}

// leaves returns the dotted paths of all that is not a map with entries.
func leaves(prefix string, values map[string]any) (paths []string) {
	for _, k := range slices.Sorted(maps.Keys(values)) {
		path := strings.TrimPrefix(prefix+"."+k, ".")
		if m, ok := values[k].(map[string]any); ok && len(m) > 0 {
			paths = append(paths, leaves(path, m)...)
		} else {
			paths = append(paths, path)
		}
	}
	return paths
}

func TestNumbersAreTheSameFromSetAndFromFile(t *testing.T) {
	withHelms(t, func(e *environment) {
		for _, n := range []int{0, 1000000, 2147483647} {
			var sets []string
			cronJob := make(map[string]any)
			for _, field := range []string{"startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit",
				"activeDeadlineSeconds", "backoffLimit", "ttlSecondsAfterFinished"} {
				cronJob[field] = n
				sets = append(sets, "--set", fmt.Sprintf("cronJob.%s=%d", field, n))
			}
			values, err := json.Marshal(map[string]any{"cronJob": cronJob})
			e.check(err)
			fromFile, fromSet := e.template(string(values)), e.template("{}", sets...)
			if fromFile != fromSet || !strings.Contains(fromSet, fmt.Sprintf(" backoffLimit: %d\n", n)) {
				e.Errorf("%d is not rendered alike, or not at all", n)
			}
		}
	})
}

// What is rendered is not only of the right shape: the API server takes it.
func TestAPIServerAcceptsWhatIsRendered(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.kubectl("label", "namespace", e.namespace, "pod-security.kubernetes.io/enforce-")
		for _, account := range []string{"pull-ecr-refresher-serviceaccount", "x"} { // a pod needs its own even for a dry run
			e.kubectl("create", "serviceaccount", account)
		}
		for name, values := range map[string]string{
			"defaults": `{}`,
			"all null": allNull(e),
			"everything": mergeOf(e, func(values string) bool {
				return !strings.Contains(values, "null") && !strings.Contains(values, "namespace: other")
			}),
		} {
			rendered := e.template(values)
			for _, nothing := range []string{"null", "<nil>", "%!", "e+06", "map["} {
				if strings.Contains(rendered, nothing) {
					e.Errorf("%s: holds %q", name, nothing)
				}
			}
			if _, output, err := e.command(rendered, "kubectl", "apply", "--namespace", e.namespace,
				"--dry-run=server", "--validate=strict", "--filename=-"); err != nil {
				e.Errorf("%s: %s", name, tail(output, 10))
			}
		}
	})
}

// allNull returns values with null for each value that the schema lets be null.
func allNull(e *environment) string {
	type node struct {
		Type       any
		Enum       []any
		Properties map[string]node
	}
	data, err := os.ReadFile(filepath.Join(chart, "values.schema.json"))
	e.check(err)
	var root node
	e.check(json.Unmarshal(data, &root))
	var walk func(n node) map[string]any
	walk = func(n node) map[string]any {
		values := make(map[string]any)
		for name, p := range n.Properties {
			types, _ := p.Type.([]any)
			if slices.Contains(types, any("null")) || slices.Contains(p.Enum, nil) {
				values[name] = nil
			} else if below := walk(p); len(below) > 0 {
				values[name] = below
			}
		}
		return values
	}
	values, err := json.Marshal(walk(root))
	e.check(err)
	if n := strings.Count(string(values), "null"); n < 30 {
		e.Fatalf("only %d values may be null: is the schema read right?", n)
	}
	return string(values)
}

// mergeOf returns all knobs at once, as far as use admits them; later ones win.
// The identities exclude each other, so that the access keys give way.
func mergeOf(e *environment, use func(values string) bool) string {
	all := make(map[string]any)
	var merge func(into, from map[string]any)
	merge = func(into, from map[string]any) {
		for k, v := range from {
			m, isMap := v.(map[string]any)
			if old, ok := into[k].(map[string]any); ok && isMap {
				merge(old, m)
			} else {
				into[k] = v
			}
		}
	}
	for _, k := range knobs {
		if use(k.values) && !strings.Contains(k.values, "accessKeyID") && !strings.Contains(k.values, "existingSecret") {
			var values map[string]any
			e.check(yaml.Unmarshal([]byte(k.values), &values))
			merge(all, values)
		}
	}
	for _, off := range []string{"refreshOnInstall", "rbac"} {
		delete(all, off)
	}
	delete(all["serviceAccount"].(map[string]any), "create")
	values, err := json.Marshal(all)
	e.check(err)
	return string(values)
}

func TestRejectedValuesFailTheInstallWithTheReason(t *testing.T) {
	withHelms(t, func(e *environment) {
		for _, c := range []struct{ values, reason string }{
			{`{schedul: x}`, `schedul`},
			{`{cronJob: {schedul: x}}`, `schedul`},
			{`{aws: {accessKeyId: x}}`, `accessKeyId`},
			{`{cronJob: {schedule: "* */4 * * *"}}`, `cronJob.schedule: "* */4 * * *" starts a run every minute of its hours, because of the "*" in the minute field`},
			{`{cronJob: {schedule: "*/1 * * * *"}}`, `starts a run every minute`},
			{`{cronJob: {schedule: "1,* * * * *"}}`, `starts a run every minute`},
			{`{cronJob: {schedule: "0-59 * * * *"}}`, `starts a run every minute`},
			{`{cronJob: {schedule: "17 */6 * *"}}`, `has 4 fields`},
			{`{cronJob: {schedule: ""}}`, `schedule`},
			{`{cronJob: {schedule: "TZ=UTC 1 1 * * *"}}`, `cronJob.timeZone`},
			{`{cronJob: {concurrencyPolicy: forbid}}`, `concurrencyPolicy`},
			{`{cronJob: {backoffLimit: -1}}`, `backoffLimit`},
			{`{cronJob: {backoffLimit: "2"}}`, `backoffLimit`},
			{`{cronJob: {backoffLimit: 1.5}}`, `backoffLimit`},
			{`{cronJob: {suspend: "no"}}`, `suspend`},
			{`{registries: ["123456789012.dkr.ecr.eu\u2014west-1.amazonaws.com"]}`, "is not a registry host: it holds \"\u2014\""},
			{`{registries: ["http://a.example"]}`, `is not a registry host`},
			{`{registries: [a.example/repository]}`, `is not a registry host`},
			{`{registries: a.example}`, `registries`},
			{`{aws: {accessKeyID: AKIA, secretAccessKey: hush, existingSecret: x}}`, `aws.existingSecret: set together with aws.accessKeyID`},
			{`{aws: {accessKeyID: AKIA}}`, `aws.secretAccessKey: missing`},
			{`{aws: {secretAccessKey: hush}}`, `aws.accessKeyID: missing`},
			{`{aws: {accessKeyID: AKIA, secretAccessKey: "hush\n"}}`, `aws.secretAccessKey: holds white space`},
			{`{aws: {roleArn: x}}`, `aws.roleArn: "x" is not the ARN of an IAM role`},
			{`{aws: {roleArn: "arn:aws:iam::123456789012:role/x", existingSecret: z}}`, `aws.roleArn: set together with access keys`},
			{`{image: {digest: "sha256:1"}}`, `image.digest`},
			{`{image: {pullPolicy: always}}`, `pullPolicy`},
			{`{logFormat: yaml}`, `logFormat`},
			{`{timeout: 60}`, `timeout`},
			{`{timeout: 60 s}`, `timeout: "60 s" is not a duration`},
			{`{imagePullSecret: {name: A_B}}`, `imagePullSecret.name: "A_B" is not a DNS-1123 name`},
			{`{imagePullSecret: {namespace: a.b}}`, `imagePullSecret.namespace: "a.b" is not a DNS-1123 label`},
			{`{fullnameOverride: f, aws: {existingSecret: f-env-secret}}`, `aws.existingSecret: "f-env-secret" is the chart's own Secret`},
			{`{imagePullSecret: {create: "yes"}}`, `create`},
			{`{fullnameOverride: ` + strings.Repeat("x", 53) + `}`, `fullnameOverride`},
			{`{serviceAccount: {create: false}}`, `serviceAccount.name: missing`},
			{`{refreshOnInstall: null}`, `refreshOnInstall`},
			{`{commonLabels: {a: 1}}`, `commonLabels`},
		} {
			output := e.helmFails("install", release, chart, "--values", e.write(c.values))
			if !strings.Contains(strings.ReplaceAll(output, `\"`, `"`), c.reason) {
				e.Errorf("%s: want %s in\n%s", c.values, c.reason, tail(output, 10))
			}
			if strings.Contains(output, "hush") {
				e.Errorf("%s: the secret is printed", c.values)
			}
		}
		if left := e.kubectl("get", "all,secrets,roles", "--output=name"); left != "" {
			e.Errorf("left behind: %s", left)
		}
	})
}

// write writes values to a file and returns its path.
func (e *environment) write(values string) string {
	e.Helper()
	f, err := os.CreateTemp(e.home, "values*.yaml")
	e.check(err)
	_, err = f.WriteString(values)
	e.check(errors.Join(err, f.Close()))
	return f.Name()
}

func (e *environment) template(values string, args ...string) string {
	e.Helper()
	return e.helm(append([]string{"template", release, chart, "--values", e.write(values)}, args...)...)
}

// objects are rendered objects, by kind.
type objects map[string][]any

// strict refuses fields that the type does not have, and those that are given twice.
var strict = serializer.NewSerializerWithOptions(serializer.DefaultMetaFactory, scheme.Scheme, scheme.Scheme,
	serializer.SerializerOptions{Yaml: true, Strict: true})

// render renders the chart and decodes each object into its type.
func (e *environment) render(values string) objects {
	e.Helper()
	all := make(objects)
	documents := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(e.template(values))))
	for {
		document, err := documents.Read()
		if err == io.EOF {
			return all
		}
		e.check(err)
		_, kind, err := strict.Decode(document, nil, nil)
		if runtime.IsMissingKind(err) && len(bytes.TrimSpace(document)) == 0 {
			continue
		}
		if err != nil {
			e.Fatalf("%s: %v in\n%s", values, err, document)
		}
		var generic any
		e.check(yaml.Unmarshal(document, &generic))
		all[kind.Kind] = append(all[kind.Kind], generic)
	}
}

// check judges one check of the table of knobs.
func (all objects) check(check string) error {
	subject, want, equal := strings.Cut(check, " = ")
	has := false
	if !equal {
		subject, want, has = strings.Cut(check, " has ")
	}
	if !equal && !has {
		subject = strings.TrimSuffix(subject, " absent")
	}
	kind, path, _ := strings.Cut(subject, " ")
	type place struct {
		object any
		prefix string
	}
	var places []place
	add := func(kind, prefix string) {
		for _, o := range all[kind] {
			places = append(places, place{o, prefix})
		}
	}
	switch kind {
	case "All":
		for kind := range all {
			add(kind, "")
		}
	case "Pods":
		add("CronJob", "spec.jobTemplate.spec.template.spec.")
		add("Job", "spec.template.spec.")
		add("Pod", "spec.")
	case "Templates":
		add("CronJob", "spec.jobTemplate.spec.template.")
		add("Job", "spec.template.")
		add("Pod", "")
	default:
		add(kind, "")
	}
	if kind == "Pods" && len(places) != 3 {
		return fmt.Errorf("%d pods", len(places))
	}
	if path == "" && !equal && !has {
		if len(places) != 0 {
			return errors.New("is there")
		}
		return nil
	}
	if len(places) == 0 {
		return errors.New("no such object")
	}
	for _, p := range places {
		got, found := lookUp(p.object, p.prefix+path)
		if !equal && !has {
			if found {
				return fmt.Errorf("got %v", got)
			}
			continue
		}
		var value any
		if err := json.Unmarshal([]byte(want), &value); err != nil {
			return err
		}
		list, _ := got.([]any)
		if equal && !reflect.DeepEqual(got, value) ||
			has && !slices.ContainsFunc(list, func(item any) bool { return reflect.DeepEqual(item, value) }) {
			return fmt.Errorf("got %v", got)
		}
	}
	return nil
}

// lookUp follows a dotted path through maps and lists.
func lookUp(object any, path string) (value any, found bool) {
	for key := range strings.SplitSeq(path, ".") {
		switch o := object.(type) {
		case map[string]any:
			if object, found = o[key]; !found {
				return nil, false
			}
		case []any:
			i, err := strconv.Atoi(key)
			if err != nil || i >= len(o) {
				return nil, false
			}
			object = o[i]
		default:
			return nil, false
		}
	}
	return object, true
}
