"""The passes, a folder for each stage: capture → canonicalize → locate → plan → rewrite → verify → store or export."""
