"""The command line, `smolvm-async`: the library's words, shown by rich or as JSON.

Exit codes:

===== ========================================================================================
0     success: for `run`, the guest was stopped, or shut itself down
1     it failed: the VM crashed or did not start, the doctor found a failure, ...
2     wrong usage, a wrong argument, or an image that cannot be used
3     the host lacks something
4     no VM has this id
128+n interrupted by signal n before it was done: 130 by Ctrl-C; `run` has then killed its VM
===== ========================================================================================

With `--json`, stdout holds one JSON document, or one on each line where things happen over time
(`run`, `logs --follow`). What failed is the last of them: `{"error": {"type": ..., "message":
...}}`; otherwise it is text on stderr. Wrong usage is always text on stderr.
"""
