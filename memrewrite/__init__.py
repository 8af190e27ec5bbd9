"""memrewrite."""
from memrewrite.passes.pipeline import apply, inspect, plan
