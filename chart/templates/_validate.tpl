{{/*
Rules of which values.schema.json could only say "does not match pattern": the
schema checks names, types and ranges, this template the rest, with the reason.
All errors are reported together. The access keys are never printed.
*/}}
{{- define "ecr-refresher.validate" -}}
{{- $errors := list }}
{{- $dns1123 := `^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$` }}

{{- $names := dict
      "nameOverride" .Values.nameOverride
      "fullnameOverride" .Values.fullnameOverride
      "imagePullSecret.name" .Values.imagePullSecret.name
      "aws.existingSecret" .Values.aws.existingSecret
      "serviceAccount.name" .Values.serviceAccount.name }}
{{- range $key, $name := $names }}
{{- if and $name (not (regexMatch $dns1123 $name)) }}
{{- $errors = append $errors (printf "%s: %q is not a DNS-1123 name (lower-case letters, digits, hyphens and dots)" $key $name) }}
{{- end }}
{{- end }}

{{- with .Values.imagePullSecret.namespace }}
{{- if not (regexMatch `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$` .) }}
{{- $errors = append $errors (printf "imagePullSecret.namespace: %q is not a DNS-1123 label (lower-case letters, digits and hyphens)" .) }}
{{- end }}
{{- end }}

{{- if gt (len (default "" .Values.fullnameOverride)) 52 }}
{{- $errors = append $errors (printf "fullnameOverride: %q has %d characters: the name of a CronJob has at most 52" .Values.fullnameOverride (len .Values.fullnameOverride)) }}
{{- end }}

{{- $schedule := trim .Values.cronJob.schedule }}
{{- $fields := regexSplit `\s+` $schedule -1 }}
{{- if regexMatch `^(CRON_)?TZ=` $schedule }}
{{- $errors = append $errors (printf "cronJob.schedule: %q names a time zone: that belongs into cronJob.timeZone" $schedule) }}
{{- else if not (hasPrefix "@" $schedule) }}
{{- if ne (len $fields) 5 }}
{{- $errors = append $errors (printf "cronJob.schedule: %q has %d fields, not the 5 of minute, hour, day, month and weekday" $schedule (len $fields)) }}
{{- else if regexMatch `(^|,)(\*|\?|0+-59)(/0*1)?(,|$)` (first $fields) }}
{{- $errors = append $errors (printf "cronJob.schedule: %q starts a run every minute of its hours, because of the %q in the minute field: name a minute, as in %q" $schedule (first $fields) (join " " (prepend (rest $fields) "17"))) }}
{{- end }}
{{- end }}

{{- range $i, $registry := .Values.registries }}
{{- $host := $registry | trimPrefix "https://" | trimSuffix "/" }}
{{- if not (regexMatch `^[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]+)?$` $host) }}
{{- $reason := "" }}
{{- with regexFindAll `[^a-z0-9.-]` $host -1 | uniq }}
{{- $reason = printf ": it holds %s" (printf "%q" . | trimAll "[]") }}
{{- end }}
{{- $errors = append $errors (printf "registries[%d]: %q is not a registry host%s (wanted: lower-case letters, digits, dots and plain hyphens, as in 123456789012.dkr.ecr.eu-west-1.amazonaws.com)" $i $registry $reason) }}
{{- end }}
{{- end }}

{{- with .Values.timeout }}
{{- if not (and (regexMatch `^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$` .) (regexMatch `[1-9]` .)) }}
{{- $errors = append $errors (printf "timeout: %q is not a duration above zero, such as 30s or 1m" .) }}
{{- end }}
{{- end }}

{{- with .Values.image.digest }}
{{- if not (regexMatch `^sha256:[0-9a-f]{64}$` .) }}
{{- $errors = append $errors (printf "image.digest: %q is not sha256: and 64 hexadecimal digits" .) }}
{{- end }}
{{- end }}

{{- with .Values.aws }}
{{- if and .accessKeyID (not .secretAccessKey) }}
{{- $errors = append $errors "aws.secretAccessKey: missing, while aws.accessKeyID is set: one is of no use without the other" }}
{{- end }}
{{- if and .secretAccessKey (not .accessKeyID) }}
{{- $errors = append $errors "aws.accessKeyID: missing, while aws.secretAccessKey is set: one is of no use without the other" }}
{{- end }}
{{- range $key := list "accessKeyID" "secretAccessKey" }}
{{- if regexMatch `\s` (default "" (index $.Values.aws $key)) }}
{{- $errors = append $errors (printf "aws.%s: holds white space, say a line break from a file" $key) }}
{{- end }}
{{- end }}
{{- if and (or .accessKeyID .secretAccessKey) .existingSecret }}
{{- $errors = append $errors "aws.existingSecret: set together with aws.accessKeyID or aws.secretAccessKey: give the access keys in one place" }}
{{- end }}
{{- if and .existingSecret (eq .existingSecret (printf "%s-env-secret" (include "ecr-refresher.fullname" $))) }}
{{- $errors = append $errors (printf "aws.existingSecret: %q is the chart's own Secret, which Helm deletes when aws.accessKeyID is not set: choose another name" .existingSecret) }}
{{- end }}
{{- if and .roleArn (or .accessKeyID .secretAccessKey .existingSecret) }}
{{- $errors = append $errors "aws.roleArn: set together with access keys, which would win: give one identity (aws.assumeRoleArn is the role to assume with access keys)" }}
{{- end }}
{{- range $key := list "roleArn" "assumeRoleArn" }}
{{- $arn := index $.Values.aws $key }}
{{- if and $arn (not (regexMatch `^arn:aws[a-z-]*:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+$` $arn)) }}
{{- $errors = append $errors (printf "aws.%s: %q is not the ARN of an IAM role, as in arn:aws:iam::123456789012:role/name" $key $arn) }}
{{- end }}
{{- end }}
{{- end }}

{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) }}
{{- $errors = append $errors "serviceAccount.name: missing, while serviceAccount.create is false: the default service account would give every pod of the namespace its rights" }}
{{- end }}

{{- if $errors }}
{{- fail (printf "invalid values:\n- %s" (join "\n- " $errors)) }}
{{- end }}
{{- end }}
