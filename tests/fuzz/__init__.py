"""Fuzzers: each kind of file that memrewrite reads is damaged at random; reading it must succeed or raise one of our errors.

`python -m tests.fuzz --kind plan --seconds 600` runs one kind, `--table` all kinds and prints the table of docs/security.md.
A case is determined by its kind, seed and number: `--case plan:17` runs case 17 again and prints what happens.

Flow: `runner` starts one process (`child`) for each kind, which makes seed files (`seeds`), then repeats: copy a seed, change
it (`mutate_*`, `hostile`), write the hashes of the manifest again, call what a command calls (`kinds`), all under a `guard`
that reports code that is compiled, imports, files outside the case, processes, sockets, prompts. `runner` also detects a
process that dies or hangs.
"""
