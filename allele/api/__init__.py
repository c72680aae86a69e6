"""The resources (`allele.dev/v1alpha1`) as pydantic models: the only source of CRDs, examples' checks and docs."""
