{{- define "allele.name" -}}
{{- ternary "allele-operator" (printf "%s-operator" .Release.Name) (eq .Release.Name "allele") | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "allele.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: allele
{{ include "allele.selector" . }}
{{- end -}}

{{- define "allele.selector" -}}
app.kubernetes.io/name: allele-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "allele.account" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "allele.name" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "allele.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}
