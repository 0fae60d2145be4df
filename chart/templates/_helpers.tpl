{{- define "ecr-refresher.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* As helm create makes it, but cut at 52, the limit of a CronJob's name. A release name may hold dots. */}}
{{- define "ecr-refresher.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $fullname := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- regexReplaceAll "[-.]+$" (default $fullname .Values.fullnameOverride | trunc 52) "" }}
{{- end }}

{{- define "ecr-refresher.serviceAccountName" -}}
{{- default (printf "%s-serviceaccount" (include "ecr-refresher.fullname" .)) .Values.serviceAccount.name }}
{{- end }}

{{- define "ecr-refresher.pullSecretName" -}}
{{- default (printf "%s-credentials" (include "ecr-refresher.fullname" .)) .Values.imagePullSecret.name }}
{{- end }}

{{- define "ecr-refresher.pullSecretNamespace" -}}
{{- default .Release.Namespace .Values.imagePullSecret.namespace }}
{{- end }}

{{/* The Secret with the AWS access keys, empty when there are none. */}}
{{- define "ecr-refresher.accessKeySecretName" -}}
{{- if .Values.aws.accessKeyID }}
{{- printf "%s-env-secret" (include "ecr-refresher.fullname" .) }}
{{- else }}
{{- default "" .Values.aws.existingSecret }}
{{- end }}
{{- end }}

{{/*
The chart's labels, those in "extra", and commonLabels; the former win. Merged
before they are printed, since a key that stands twice is refused by Helm 4's
server-side apply. Call with (dict "context" $ "extra" .Values.podLabels).
*/}}
{{- define "ecr-refresher.mergedLabels" -}}
{{- $labels := dict
      "app.kubernetes.io/name" (include "ecr-refresher.name" .context)
      "app.kubernetes.io/instance" .context.Release.Name
      "app.kubernetes.io/version" .context.Chart.AppVersion
      "app.kubernetes.io/managed-by" .context.Release.Service
      "helm.sh/chart" (printf "%s-%s" .context.Chart.Name .context.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") }}
{{- merge $labels (default dict .extra) (default dict .context.Values.commonLabels) | toYaml }}
{{- end }}

{{- define "ecr-refresher.labels" -}}
{{- include "ecr-refresher.mergedLabels" (dict "context" . "extra" dict) }}
{{- end }}

{{/*
One line for each of "fields" that is not null in "values". Zero must survive,
which "with" and "if" drop, and 1000000 from a file is a float64, which prints
as 1e+06 unless it goes through int64.
*/}}
{{- define "ecr-refresher.integers" -}}
{{- $lines := list }}
{{- range $field := .fields }}
{{- $value := index $.values $field }}
{{- if not (kindIs "invalid" $value) }}
{{- $lines = append $lines (printf "%s: %d" $field (int64 $value)) }}
{{- end }}
{{- end }}
{{- join "\n" $lines }}
{{- end }}

{{/*
The spec of the one Job that CronJob and hook share. A configuration error (exit
code 2) is not tried again, and a pod that its node evicted is not counted as a
try. status is given, since a default filled in by the API server shows up as a
difference in Argo CD.
*/}}
{{- define "ecr-refresher.jobSpec" -}}
podFailurePolicy:
  rules:
    - action: Ignore
      onPodConditions:
        - type: DisruptionTarget
          status: "True"
    - action: FailJob
      onExitCodes:
        containerName: ecr-refresher
        operator: In
        values: [2]
{{- with include "ecr-refresher.integers" (dict "values" .Values.cronJob "fields" (list "backoffLimit" "activeDeadlineSeconds")) }}
{{ . }}
{{- end }}
template:
  metadata:
    labels:
      {{- include "ecr-refresher.mergedLabels" (dict "context" . "extra" .Values.podLabels) | nindent 6 }}
    {{- with .Values.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    {{- include "ecr-refresher.podSpec" (dict "context" . "dryRun" false) | nindent 4 }}
{{- end }}

{{/* The pod of CronJob, hook and test. Call with (dict "context" $ "dryRun" false). */}}
{{- define "ecr-refresher.podSpec" -}}
{{- $dryRun := .dryRun }}
{{- with .context -}}
serviceAccountName: {{ include "ecr-refresher.serviceAccountName" . | quote }}
automountServiceAccountToken: true
enableServiceLinks: false
restartPolicy: Never
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
containers:
  - name: ecr-refresher
    image: {{ include "ecr-refresher.image" . | quote }}
    {{- with .Values.image.pullPolicy }}
    imagePullPolicy: {{ . }}
    {{- end }}
    args:
      {{- include "ecr-refresher.args" (dict "context" . "dryRun" $dryRun) | nindent 6 }}
    {{- with include "ecr-refresher.env" . | trim }}
    env:
      {{- . | nindent 6 }}
    {{- end }}
    {{- with .Values.envFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    terminationMessagePolicy: FallbackToLogsOnError
    {{- with .Values.securityContext }}
    securityContext:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .Values.resources }}
    resources:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- if or .Values.aws.roleArn .Values.extraVolumeMounts }}
    volumeMounts:
      {{- if .Values.aws.roleArn }}
      - name: aws-token
        mountPath: /var/run/secrets/sts.amazonaws.com/serviceaccount
        readOnly: true
      {{- end }}
      {{- with .Values.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- end }}
{{- if or .Values.aws.roleArn .Values.extraVolumes }}
volumes:
  {{- if .Values.aws.roleArn }}
  - name: aws-token
    projected:
      sources:
        - serviceAccountToken:
            audience: sts.amazonaws.com
            expirationSeconds: 3600
            path: token
  {{- end }}
  {{- with .Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ecr-refresher.image" -}}
{{- with .Values.image }}
{{- if .digest }}
{{- printf "%s@%s" .repository .digest }}
{{- else }}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) }}
{{- end }}
{{- end }}
{{- end }}

{{/* --namespace is left to the pod's own where that is the one, and --dry-run stands last, so that extraArgs cannot undo it. */}}
{{- define "ecr-refresher.args" -}}
{{- $args := list }}
{{- with .context -}}
{{- $args = append $args (printf "--secret=%s" (include "ecr-refresher.pullSecretName" .)) }}
{{- with .Values.imagePullSecret.namespace }}{{ $args = append $args (printf "--namespace=%s" .) }}{{ end }}
{{- range .Values.registries }}{{ $args = append $args (printf "--registry=%s" .) }}{{ end }}
{{- with .Values.region }}{{ $args = append $args (printf "--region=%s" .) }}{{ end }}
{{- with .Values.timeout }}{{ $args = append $args (printf "--timeout=%s" .) }}{{ end }}
{{- with .Values.logFormat }}{{ $args = append $args (printf "--log-format=%s" .) }}{{ end }}
{{- with .Values.aws.assumeRoleArn }}{{ $args = append $args (printf "--assume-role-arn=%s" .) }}{{ end }}
{{- $args = concat $args (default list .Values.extraArgs) }}
{{- end }}
{{- if .dryRun }}{{ $args = append $args "--dry-run" }}{{ end }}
{{- toYaml $args }}
{{- end }}

{{/*
The access keys are named one by one, not taken by envFrom: a key that is missing
in existingSecret then stops the pod, where envFrom would let the run fall back to
another identity.
*/}}
{{- define "ecr-refresher.env" -}}
{{- with include "ecr-refresher.accessKeySecretName" . }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: AWS_ACCESS_KEY_ID
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: AWS_SECRET_ACCESS_KEY
{{- end }}
{{- with .Values.aws.existingSecret }}
- name: AWS_SESSION_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . | quote }}
      key: AWS_SESSION_TOKEN
      optional: true
{{- end }}
{{- with .Values.aws.roleArn }}
- name: AWS_ROLE_ARN
  value: {{ . | quote }}
- name: AWS_WEB_IDENTITY_TOKEN_FILE
  value: /var/run/secrets/sts.amazonaws.com/serviceaccount/token
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}
