{{/* The value `identity`, with the folders that gateway.apiKeySecrets are mounted at. */}}
{{- define "tidegate.identity" -}}
{{- $identity := deepCopy .Values.identity -}}
{{- if .Values.gateway.apiKeySecrets -}}
{{- $folders := list -}}
{{- range .Values.gateway.apiKeySecrets -}}
{{- $folders = append $folders (printf "/etc/tidegate/api-keys/%s" .) -}}
{{- end -}}
{{- $_ := set $identity.apiKeys "directories" (concat ($identity.apiKeys.directories | default list) $folders) -}}
{{- end -}}
{{- toYaml $identity -}}
{{- end -}}
