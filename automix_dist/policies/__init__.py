"""The mixing policies, one a file, found by their names (docs/policies.md)."""
