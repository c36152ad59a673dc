"""What a guest reaches over the network, decided outside the guest; needs no privileges.

Everything that a guest sends leaves through sockets of its QEMU. A seccomp filter makes QEMU wait
at each call that names the other end of a socket, and this process makes the call in QEMU's place,
to an address that the policy allows, or refuses it. So a guest's operating system does not matter,
nor does what root does in the guest.

- `policy`: decides where a packet may go. Pure.
- `guard`: the filter, and the thread that answers QEMU's calls by the policy.
"""
