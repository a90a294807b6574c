{{- /* The plugin configuration: what the values say, and what must agree with the other objects. */}}
{{- define "envoy-pd.config" -}}
{{- $namespace := .Release.Namespace -}}
{{- $fixed := dict
  "cluster" (printf "httproute/%s/pd/rule/0" $namespace)
  "destination_header" "x-pd-destination"
  "max_body_bytes" (mul .Values.filter.maxBodyMiB 1048576)
  "control" (dict "cluster" (printf "httproute/%s/pd-control/rule/0" $namespace))
-}}
{{- toYaml (mergeOverwrite (deepCopy .Values.filter.config) $fixed) -}}
{{- end -}}
