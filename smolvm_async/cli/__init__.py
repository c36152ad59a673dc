"""The command line `smolvm-async`: the library as shell commands, with text or JSON output.

Exit codes:

===== ========================================================================================
0     success: for `run`, the guest was stopped, or shut itself down
1     failure: the VM crashed or did not start, the doctor found a failure, ...
2     wrong usage, a wrong argument, or an image that cannot be used
3     the host lacks something
4     no VM has this id
128+n interrupted by signal n before the end: 130 by Ctrl-C; `run` has then killed its VM
===== ========================================================================================

With `--json`, stdout is one JSON document. Commands that report over time (`run`, `logs --follow`)
write one document on each line. The last document may be an error:
`{"error": {"type": ..., "message": ...}}`. Without `--json`, an error is text on stderr. Wrong
usage is always text on stderr.
"""
