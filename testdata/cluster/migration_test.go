package cluster

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// oldChart is the chart that this one replaces, as far as an upgrade meets it:
// a CronJob that runs the AWS CLI and curl, and a Secret that it renders.
var oldChart = map[string]string{
	"Chart.yaml": `
apiVersion: v2
name: ecr-login
version: 1.0.0
`,
	"values.yaml": `
cronJob: {period: "0 */8 * * *"}
ecrRegistry: {registry: "", awsDefaultRegion: "", awsAccessKeyID: "", awsSecretAccessKey: ""}
`,
	"templates/all.yaml": `
apiVersion: v1
kind: Secret
metadata: {name: {{ .Release.Name }}-ecr-login-credentials}
type: kubernetes.io/dockerconfigjson
data:
  .dockerconfigjson: {{ "{}" | b64enc }}
---
apiVersion: v1
kind: Secret
metadata: {name: {{ .Release.Name }}-ecr-login-env-secret}
stringData:
  AWS_ACCESS_KEY_ID: {{ .Values.ecrRegistry.awsAccessKeyID }}
  AWS_SECRET_ACCESS_KEY: {{ .Values.ecrRegistry.awsSecretAccessKey }}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: {{ .Release.Name }}-ecr-login-serviceaccount}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: {{ .Release.Name }}-ecr-login-update-role}
rules:
  - {apiGroups: [""], resources: [secrets], resourceNames: [{{ .Release.Name }}-ecr-login-credentials], verbs: [patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: {{ .Release.Name }}-ecr-login-rolebinder}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ .Release.Name }}-ecr-login-update-role}
subjects:
  - {kind: ServiceAccount, name: {{ .Release.Name }}-ecr-login-serviceaccount}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: {{ .Release.Name }}-ecr-login}
spec:
  schedule: {{ .Values.cronJob.period | quote }}
  jobTemplate:
    spec:
      template:
        spec:
          serviceAccountName: {{ .Release.Name }}-ecr-login-serviceaccount
          restartPolicy: OnFailure
          containers:
            - name: kubectl
              image: amazon/aws-cli
              command: [/bin/sh, -c, "aws ecr get-login-password && curl --request PATCH"]
              env:
                - {name: AWS_DEFAULT_REGION, value: {{ .Values.ecrRegistry.awsDefaultRegion | quote }}}
                - {name: DOCKER_REGISTRY_SERVER, value: {{ .Values.ecrRegistry.registry | quote }}}
              envFrom:
                - secretRef: {name: {{ .Release.Name }}-ecr-login-env-secret}
`,
}

func TestUpgradeFromTheOldChartKeepsTheSecret(t *testing.T) {
	t.Parallel()
	const (
		fullname = release + "-ecr-login"
		secret   = fullname + "-credentials"
	)
	for _, test := range []struct{ name, before, after string }{
		{"helm3", "helm3", "helm3"},
		{"helm4", "helm4", "helm4"},
		{"helm3-then-helm4", "helm3", "helm4"},
	} {
		for _, keep := range []bool{true, false} {
			name := test.name
			if !keep {
				name += "-not-annotated"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				e := newEnvironment(t, test.before)
				dir := filepath.Join(e.home, "old")
				e.check(os.MkdirAll(filepath.Join(dir, "templates"), 0o700))
				for name, text := range oldChart {
					e.check(os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
				}
				e.helm("install", release, dir, "--set", "ecrRegistry.registry="+registry, "--set", "ecrRegistry.awsDefaultRegion="+region,
					"--set", "ecrRegistry.awsAccessKeyID="+accessKey.ID, "--set", "ecrRegistry.awsSecretAccessKey="+accessKey.Secret)
				// What the old CronJob's curl does.
				patch := `{"data":{".dockerconfigjson":"` + base64.StdEncoding.EncodeToString([]byte(dockerConfig("old-password"))) + `"}}`
				_, err := e.clientOf(e.namespace, fullname+"-serviceaccount").CoreV1().Secrets(e.namespace).
					Patch(e.Context(), secret, types.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: "curl"})
				e.check(err)
				if keep {
					e.kubectl("annotate", "secret", secret, "helm.sh/resource-policy=keep")
				}
				before := e.secretIn(e.namespace, secret)

				e.helmName = test.after
				e.upgrade("--set", "fullnameOverride="+fullname, "--set", "refreshOnInstall=false")
				if !keep { // so the annotation is what saves it
					_, err := cluster.client.CoreV1().Secrets(e.namespace).Get(e.Context(), secret, metav1.GetOptions{})
					if !apierrors.IsNotFound(err) {
						e.Errorf("getting the Secret: %v, want NotFound", err)
					}
					return
				}
				e.wantSame(before)

				e.upgrade("--set", "fullnameOverride="+fullname)
				after := e.secretIn(e.namespace, secret)
				if after.UID != before.UID {
					e.Error("the Secret was replaced")
				}
				e.wantContent(after, "first-password")
				if r := e.runCronJob(e.namespace, fullname); r.exit != 0 {
					e.Error(r.stderr)
				}
			})
		}
	}
}
