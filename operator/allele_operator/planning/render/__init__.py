"""Values → manifests. The same pods run on a cluster and, with addresses replaced, as processes of `allele run`."""
