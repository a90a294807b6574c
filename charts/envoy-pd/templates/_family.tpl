{{- /* The address that stands for all of a pod's, of the families that `gateway.ipFamily` names. */}}
{{- define "envoy-pd.anyAddress" -}}
{{- if has .Values.gateway.ipFamily (list "IPv6" "DualStack") -}}[::]{{- else -}}0.0.0.0{{- end -}}
{{- end -}}
{{- /* A pod's addresses of both families, where there are both. */}}
{{- define "envoy-pd.familyPolicy" -}}
{{- if eq (default "" .Values.gateway.ipFamily) "DualStack" }}
  ipFamilyPolicy: PreferDualStack
{{- end }}
{{- end -}}
