"""A VM's control socket: the owner serves it, other processes of the same user attach to it.

Each line is a JSON-RPC 2.0 message; the raw bytes of a `bytes` result follow its line. The client
sends requests (`stop`, `screen.dump`, ...) for methods that are marked with `@rpc`. The server
sends notifications: first `hello`, then `event`, `status` and `console` as they happen, and last
`ended`, with the failure and the shutdown report. Then the server closes the connection.
"""
