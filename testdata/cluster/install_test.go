package cluster

import (
	"encoding/json"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestPodsAreAdmittedWhereRestrictedIsEnforced(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.install()
		e.mustRun()
		e.helm("test", release)
		pods, err := cluster.client.CoreV1().Pods(e.namespace).List(e.Context(), metav1.ListOptions{
			LabelSelector: "app.kubernetes.io/instance=" + release + ",app.kubernetes.io/name=ecr-refresher"})
		e.check(err)
		if len(pods.Items) != 3 {
			e.Errorf("%d pods, want those of hook, CronJob and test", len(pods.Items))
		}
		for _, pod := range pods.Items {
			if pod.Status.Phase != corev1.PodSucceeded {
				e.Errorf("pod %s: %s", pod.Name, pod.Status.Phase)
			}
		}
		// The namespace does refuse what it should.
		e.upgrade("--set", "securityContext.allowPrivilegeEscalation=true", "--set", "refreshOnInstall=false")
		if r := e.runNow(); r.exit != -1 || !strings.Contains(r.stderr, `violates PodSecurity "restricted:latest"`) {
			e.Errorf("a privileged pod: exit code %d, %s", r.exit, r.stderr)
		}
	})
}

func TestHookCreatesTheSecretAndLaterRunsPatchItInPlace(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.install()
		created := e.secret()
		e.wantContent(created, "first-password")
		if got := created.Labels; len(got) != 1 || got["app.kubernetes.io/managed-by"] != "ecr-refresher" {
			e.Errorf("labels %v", got)
		}
		e.kubectl("patch", "secret", pullSecret, "--type=merge", "--patch",
			`{"metadata":{"labels":{"team":"a"},"annotations":{"reflector/allowed":"true"}},"data":{"other":"b3RoZXI="}}`)

		e.setPassword("second-password")
		e.mustRun()
		patched := e.secret()
		e.wantContent(patched, "second-password")
		if patched.UID != created.UID {
			e.Error("the Secret was replaced")
		}
		if patched.Labels["team"] != "a" || patched.Annotations["reflector/allowed"] != "true" || string(patched.Data["other"]) != "other" {
			e.Errorf("somebody else's label, annotation or key is gone: %v %v", patched.Labels, patched.Annotations)
		}
		if len(patched.Data) != 2 || len(patched.Labels) != 2 || len(patched.Annotations) != 3 {
			e.Errorf("more was written than promised: %v %v", patched.Labels, patched.Annotations)
		}
	})
}

func TestUpgradesAndRollbackLeaveTheSecretAlone(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.install()
		before := e.secret()
		e.upgrade("--set", "refreshOnInstall=false")
		e.wantSame(before)
		e.upgrade("--set", "refreshOnInstall=false", "--set", "cronJob.schedule=5 */4 * * *", "--set", "commonLabels.a=b")
		e.wantSame(before)
		e.helm("rollback", release, "1")
		e.wantSame(before)
		// With its hook an upgrade is a run: the same Secret, refreshed.
		e.upgrade("--set", "timeout=30s")
		after := e.secret()
		if after.UID != before.UID || string(after.Data[corev1.DockerConfigJsonKey]) != string(before.Data[corev1.DockerConfigJsonKey]) {
			e.Error("the upgrade changed the UID or the data")
		}
	})
}

func TestDeletedSecretComesBackUnlessCreatingIsNotAllowed(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.install()
		e.deleteSecret()
		e.mustRun()
		e.wantContent(e.secret(), "first-password")

		e.upgrade("--set", "imagePullSecret.create=false", "--set", "refreshOnInstall=false")
		e.mustRun() // there is a Secret to patch
		e.deleteSecret()
		r := e.runNow()
		want := `level=ERROR msg="secret ` + e.namespace + `/` + pullSecret + ` does not exist, and creating it was refused: ` +
			`HTTP 403 Forbidden: secrets '` + pullSecret + `' is forbidden: User 'system:serviceaccount:` + e.namespace + `:` + fullname +
			`-serviceaccount' cannot create resource 'secrets' in API group '' in the namespace '` + e.namespace + `'" ` +
			`hint="create it once: kubectl create secret docker-registry ` + pullSecret + ` -n ` + e.namespace +
			` --docker-server=REGISTRY --docker-username=AWS --docker-password=placeholder; or allow it to be created: ` +
			`a Role in namespace ` + e.namespace + ` with the rule {apiGroups: [''], resources: [secrets], resourceNames: [` + pullSecret +
			`], verbs: [patch, create]}, bound to this pod's ServiceAccount"`
		e.wantFailure(r, 1, want)
		e.wantNoSecret()

		// The cure that the line names is one.
		e.kubectl("create", "secret", "docker-registry", pullSecret,
			"--docker-server=REGISTRY", "--docker-username=AWS", "--docker-password=placeholder")
		e.mustRun()
		e.wantContent(e.secret(), "first-password")
	})
}

// wantFailure checks exit code and last line, the time of which is cut off.
func (e *environment) wantFailure(r result, exit int, lastLine string) {
	e.Helper()
	_, got, _ := strings.Cut(r.lastLine(), " ")
	if r.exit != exit || got != lastLine {
		e.Errorf("exit code %d, want %d; last line\n%s\nwant\n%s", r.exit, exit, got, lastLine)
	}
	if r.stdout != "" {
		e.Errorf("stdout %q", r.stdout)
	}
}

func TestDryRunAndHelmTestStoreNothing(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.install()
		before := e.secret()
		e.setPassword("second-password")
		e.helm("test", release)
		e.wantSame(before)
		e.upgrade("--set", "extraArgs[0]=--dry-run", "--set", "refreshOnInstall=false")
		e.mustRun()
		e.wantSame(before)

		e.deleteSecret()
		e.mustRun()
		e.helm("test", release)
		e.wantNoSecret()

		// helm test does judge: without its Role it fails.
		e.kubectl("delete", "role", fullname+"-update-role")
		e.helmFails("test", release)
	})
}

func TestReleasesDoNotMeet(t *testing.T) {
	withHelms(t, func(e *environment) {
		other := e.newNamespace()
		install := func(namespace, name string) {
			e.helmIn(namespace, "install", name, chart, "--values", e.values, "--timeout=60s")
		}
		install(e.namespace, "a")
		install(e.namespace, "b")
		install(other, "a")
		type key struct{ namespace, name string }
		all := []key{{e.namespace, "a"}, {e.namespace, "b"}, {other, "a"}}
		versions := func() map[key]string {
			m := make(map[key]string)
			for _, k := range all {
				m[k] = e.secretIn(k.namespace, k.name+"-ecr-refresher-credentials").ResourceVersion
			}
			return m
		}
		for _, k := range all {
			before := versions()
			e.setPassword("password-" + k.namespace + k.name)
			if r := e.runCronJob(k.namespace, k.name+"-ecr-refresher"); r.exit != 0 {
				e.Fatal(r.stderr)
			}
			for other, version := range versions() {
				if changed := version != before[other]; changed != (other == k) {
					e.Errorf("a run of %v changed the Secret of %v: %t", k, other, changed)
				}
			}
		}
		before := versions()
		e.helm("uninstall", "a")
		for k, version := range versions() {
			if version != before[k] {
				e.Errorf("uninstalling %v changed the Secret of %v", all[0], k)
			}
		}
		for _, k := range all[1:] {
			if r := e.runCronJob(k.namespace, k.name+"-ecr-refresher"); r.exit != 0 {
				e.Errorf("%v after another release was uninstalled: %s", k, r.stderr)
			}
		}
	})
}

func TestUninstallLeavesTheSecretAndReinstallAdoptsIt(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.install()
		before := e.secret()
		e.helm("uninstall", release)
		e.wantSame(before)
		left := e.kubectl("get", "cronjobs,jobs,serviceaccounts,roles,rolebindings,secrets", "--output=name")
		if got := strings.Fields(left); len(got) != 2 { // and the namespace's default service account
			e.Errorf("left behind: %v", got)
		}
		e.setPassword("second-password")
		e.install()
		after := e.secret()
		if after.UID != before.UID {
			e.Error("the Secret was replaced")
		}
		e.wantContent(after, "second-password")
	})
}

// What Argo CD does on each sync.
func TestTemplateAndApplyTwiceLeavesTheSecretAlone(t *testing.T) {
	withHelms(t, func(e *environment) {
		manifests := e.helm("template", release, chart, "--values", e.values, "--skip-tests")
		e.kubectlWith(manifests, "apply", "--filename=-")
		if r := e.wait(e.namespace, fullname+"-refresh"); r.exit != 0 {
			e.Fatal(r.stderr)
		}
		before := e.secret()
		e.wantContent(before, "first-password")
		manifests = e.helm("template", release, chart, "--values", e.values, "--skip-tests")
		out := e.kubectlWith(manifests, "apply", "--filename=-")
		for line := range strings.Lines(out) {
			if !strings.HasSuffix(line, " unchanged\n") {
				e.Errorf("second apply: %s", line)
			}
		}
		e.wantSame(before)
	})
}

// The commands that the notes print are run as they stand.
func TestNotesGiveTheExpiryOfTheToken(t *testing.T) {
	withHelms(t, func(e *environment) {
		e.install()
		var status struct{ Info struct{ Notes string } }
		e.check(json.Unmarshal([]byte(e.helm("status", release, "--output=json")), &status))
		want := e.secret().Annotations["ecr-refresher/expires-at"]
		_, rest, _ := strings.Cut(status.Info.Notes, "-o jsonpath='")
		expression, _, ok := strings.Cut(rest, "'")
		if !ok {
			e.Fatalf("notes:\n%s", status.Info.Notes)
		}
		if got := e.kubectl("get", "secret", pullSecret, "--output=jsonpath="+expression); got != want+"\n" {
			e.Errorf("got %q, want %q", got, want)
		}
	})
}
