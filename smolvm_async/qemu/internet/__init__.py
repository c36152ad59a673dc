"""What a guest reaches over the network, decided outside the guest; needs no privileges.

Everything that a guest sends leaves through sockets of its QEMU. A seccomp filter makes QEMU wait
at each call that names the other end of a socket, and this process makes the call in QEMU's place,
to an address that the policy allows, or refuses it. So a guest's operating system does not matter,
nor does what root does in the guest.

- `policy`: a decision where a packet may go. `rules`: the policy of `InternetSettings`.
- `guard`: the filter, and the thread that answers QEMU's calls by the policy.
- `gateway`: a thread for a guest that may reach only some names, with a `resolver`, which answers
  all DNS queries by synthetic addresses (`names`), and a `relay`, which makes the connections to
  them and checks the client's first bytes (`first_packet`).
- `service`: all of them, for one VM.
"""
