#!/usr/bin/perl
# The parked process: sets a guest right that was restored from a snapshot. Its stdin and stdout are
# the port smolvm.control. It writes "parked", and waits for a line of five words from the host:
#
#     SEED TIME NAME HOST_KEY AUTHORIZED_KEYS
#
# TIME is in seconds since the epoch, NAME is the host's; the others are in hexadecimal. The answer
# is "right", or the reason if only the random numbers are not. It is Perl without modules, since under TCG new code is slow to run: after
# a restore, Python takes longer, and so does a start of it at each boot. Numbers of system calls
# and flags are those of x86-64.

my $host_key = '/run/smolvm/host_key';
my $listening = '/run/sshd.pid';    # sshd writes it when it accepts connections

sub put {    # replace the content of a file; of the same length, this is quick
    my ($path, $content) = @_;
    sysopen my $file, $path, 0x41, 0600 or return;    # O_WRONLY | O_CREAT
    syswrite $file, $content;
    truncate $file, length $content if -s $file != length $content;
}

sub reseed {    # the kernel's pool mixes the seed in, then draws a new key for /dev/urandom
    sysopen my $pool, '/dev/urandom', 2 or return 0;    # O_RDWR
    syswrite($pool, pack 'H*', $_[0]) and ioctl $pool, 0x5207, 0;    # RNDRESEEDCRNG
}

sub wait_for_sshd {
    for (1 .. 5000) {
        return if -s $listening;
        select undef, undef, undef, 0.002;
    }
}

sub set_host_key {    # make the SSH server use a new key, and wait until it does
    my ($waiting, $key) = @_;
    if (!$waiting) {
        wait_for_sshd();    # it may just be starting, with the old key
        open my $file, '<', $listening;
        my $pid = <$file>;
        unlink $listening;
        put($host_key, $key);
        kill 'HUP', $pid if $pid;
    } else {    # it has opened a pipe in the place of its key, and will open the key again
        put("$host_key.new", $key);
        rename "$host_key.new", $host_key;
        syswrite $waiting, $key;
        close $waiting;
    }
    wait_for_sshd();
}

my $waiting;
sysopen $waiting, $host_key, 1 if -p $host_key;    # waits for sshd
syswrite STDOUT, "parked\n";
for (;;) {
    my $line = <STDIN>;
    if (!defined $line) {    # the host has closed its end, and may open another one
        select undef, undef, undef, 0.1;
        next;
    }
    my ($seed, $time, $name, $key, $authorized_keys) = split ' ', $line;
    my $reseeded = reseed($seed);
    syscall 227, 0, pack 'qq', int $time, ($time - int $time) * 1e9;    # clock_settime
    put('/proc/sys/kernel/hostname', $name);
    put('/etc/hostname', "$name\n");
    put('/etc/hosts', "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 $name\n");
    put('/root/.ssh/authorized_keys', pack 'H*', $authorized_keys);
    set_host_key($waiting, pack 'H*', $key);
    undef $waiting;
    syswrite STDOUT, $reseeded ? "right\n" : "the random numbers were not reseeded: $!\n";
}
