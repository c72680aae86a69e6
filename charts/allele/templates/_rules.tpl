{{/* What the operator may do where it works: no verb on secrets, nothing on nodes, no pods/exec. */}}
{{- define "allele.rules" -}}
- apiGroups: [allele.dev]
  resources: [adapterstores, adapterruntimes, basepools, adapterpopulations, rlruns]
  verbs: [get, list, watch, patch]
- apiGroups: [allele.dev] # a run with a runtimeRef has a pool of its own
  resources: [basepools]
  verbs: [create, delete]
- apiGroups: [allele.dev]
  resources: [adapterstores/status, adapterruntimes/status, basepools/status, adapterpopulations/status, rlruns/status]
  verbs: [patch]
- apiGroups: [allele.dev] # blockOwnerDeletion, where that is enforced
  resources:
    [adapterstores/finalizers, adapterruntimes/finalizers, basepools/finalizers, adapterpopulations/finalizers, rlruns/finalizers]
  verbs: [update]
- apiGroups: [jobset.x-k8s.io]
  resources: [jobsets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [batch] # cronjobs: apply of an absent object needs create too
  resources: [jobs, cronjobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, delete]
- apiGroups: [""] # apply of an absent object needs create too
  resources: [configmaps, services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""] # is it being deleted? Then no Job can erase what a population of it leaves in the store
  resources: [namespaces]
  verbs: [get]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [get, create, patch]
{{- end -}}
