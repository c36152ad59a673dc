# Runs a command in a Windows guest: see windows.py. It reads values from its standard input, and
# copies the command's output to the files `out` and `err`. Over SSH, the command inherits the output
# of this script, which removes the directory then. It needs PowerShell 5.1.
$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
$utf8 = New-Object Text.UTF8Encoding $false
try {
    [Console]::InputEncoding = $utf8
    [Console]::OutputEncoding = $utf8
} catch {
    # Without a console, there is no code page.
}

$value = @{}
[byte[]] $content = @()
$variables = @{}
foreach ($line in $input) {
    $name, $encoded = ([string] $line).Split(' ')
    $bytes = [Convert]::FromBase64String($encoded)
    if ($name -eq 'content') {
        $content = $bytes
    } elseif ($name.StartsWith('env.')) {
        $variables[$name.Substring(4)] = $utf8.GetString($bytes)
    } else {
        $value[$name] = $utf8.GetString($bytes)
    }
}
# The agent or the session may have ended while it sent the values.
if (-not $value['whole']) { exit 1 }
$directory = $value['directory']
$over_ssh = $value['output'] -eq 'session'

# Only LocalSystem and the owner may use the directory, from its beginning.
$security = New-Object Security.AccessControl.DirectorySecurity
$security.SetSecurityDescriptorSddlForm('D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;OW)')
[void] [IO.Directory]::CreateDirectory($directory, $security)
if ($value['input'] -eq 'empty') {
    [IO.File]::WriteAllBytes("$directory\in", $content)
    [IO.File]::WriteAllBytes("$directory\end", $content)
    exit 0
}

function Exit-Runner([int] $code) {
    if ($over_ssh -or $value['detached']) {
        # The library may be writing a part of the input: the file cannot be removed then.
        for ($again = 0; $again -lt 50 -and [IO.Directory]::Exists($directory); $again++) {
            if ($again) { Start-Sleep -Milliseconds 100 }
            try { [IO.Directory]::Delete($directory, $true) } catch { }
        }
    }
    exit $code
}

function Add-Output([string] $name, [byte[]] $bytes, [int] $count) {
    if ($over_ssh -or $value['detached']) { return }
    while ($true) {
        try {
            $file = [IO.File]::Open("$directory\$name", 'Append', 'Write', 'None')
            break
        } catch {
            # The agent has the file open: ERROR_SHARING_VIOLATION.
            if ($_.Exception.GetBaseException().HResult -ne 0x80070020) { throw }
            Start-Sleep -Milliseconds 5
        }
    }
    $file.Write($bytes, 0, $count)
    $file.Close()
}

Add-Output 'out' $content 0
Add-Output 'err' $content 0
try {
    if ($value['script']) {
        # The encoding adds no byte order mark to the one in the text.
        [IO.File]::WriteAllText($value['script'], $value['text'], $utf8)
    }
    $start = New-Object Diagnostics.ProcessStartInfo $value['program'], $value['arguments']
    $start.UseShellExecute = $false
    $start.RedirectStandardInput = $true
    $start.RedirectStandardOutput = -not $over_ssh
    $start.RedirectStandardError = -not $over_ssh
    $start.WorkingDirectory = $env:USERPROFILE
    if ($value['cwd']) { $start.WorkingDirectory = $value['cwd'] }
    # The variables of set_env_vars().
    $kept = "$env:USERPROFILE\.smolvm_env"
    if ([IO.File]::Exists($kept)) {
        foreach ($line in [IO.File]::ReadAllLines($kept)) {
            $name, $encoded = $line.Split(' ')
            $bytes = [Convert]::FromBase64String($encoded)
            $start.EnvironmentVariables[$name] = $utf8.GetString($bytes)
        }
    }
    foreach ($name in $variables.Keys) {
        $start.EnvironmentVariables[$name] = $variables[$name]
    }
    $process = [Diagnostics.Process]::Start($start)
} catch {
    $bytes = $utf8.GetBytes("$($_.Exception.GetBaseException().Message)`r`n")
    if ($over_ssh) { [Console]::OpenStandardError().Write($bytes, 0, $bytes.Length) }
    Add-Output 'err' $bytes $bytes.Length
    Exit-Runner 126
}

$source = New-Object IO.MemoryStream (, $content)
# The agent may write to the file meanwhile.
if ('file', 'live' -contains $value['input']) { $source = [IO.File]::Open("$directory\in", 'Open', 'Read', 'ReadWrite') }
$sink = $process.StandardInput.BaseStream
$feeding = $null
$size = 65536
$piece = New-Object byte[] $size
$part = 0
$complete = 'file', 'here' -contains $value['input']
$since = [Diagnostics.Stopwatch]::StartNew()
$after = New-Object Diagnostics.Stopwatch
[string[]] $names = if ($over_ssh) { @() } else { 'out', 'err' }
$outputs = foreach ($name in $names) {
    $stream = $process.StandardOutput.BaseStream
    if ($name -eq 'err') { $stream = $process.StandardError.BaseStream }
    $buffer = New-Object byte[] $size
    @{
        name = $name
        stream = $stream
        buffer = $buffer
        pending = New-Object IO.MemoryStream
        reading = $stream.ReadAsync($buffer, 0, $size)
    }
}
do {
    [Threading.Tasks.Task[]] $tasks = @($outputs | ForEach-Object { $_.reading } | Where-Object { $_ })
    [Threading.Tasks.Task[]] $any = @($tasks) + @($feeding | Where-Object { $_ })
    if ($any.Length) {
        [void] [Threading.Tasks.Task]::WaitAny($any, 50)
    } else {
        [void] $process.WaitForExit(50)
    }
    foreach ($output in $outputs) {
        if ($output.reading -and $output.reading.IsCompleted) {
            $count = $output.reading.Result
            $output.pending.Write($output.buffer, 0, $count)
            $output.reading = $null
            if ($count) { $output.reading = $output.stream.ReadAsync($output.buffer, 0, $size) }
        }
    }
    if ($sink -and (-not $feeding -or $feeding.IsCompleted)) {
        # The command may have closed its standard input, or ended: drop the rest.
        if ($feeding -and $feeding.IsFaulted) {
            try { $sink.Close() } catch { }
            $sink = [IO.Stream]::Null
        }
        $feeding = $null
        if ($value['input'] -eq 'live') {
            # Look for the end of the input first: all of the input is in the file then.
            $complete = (New-Object IO.FileInfo "$directory\end").Length
        }
        $count = $source.Read($piece, 0, $size)
        if (-not $count -and -not $complete -and [IO.File]::Exists("$directory\$part")) {
            # Over SSH: the next part of the input, or its end, an empty part.
            try {
                $bytes = [IO.File]::ReadAllBytes("$directory\$part")
                [IO.File]::Delete("$directory\$part")
                $part++
                $source = New-Object IO.MemoryStream (, $bytes)
                $complete = -not $bytes.Length
                $count = $source.Read($piece, 0, $size)
            } catch {
                # A virus scanner has the file open: look again.
            }
        }
        if (-not $count -and -not $unflushed -and $complete) {
            try { $sink.Close() } catch { }
            $sink = $null
        } elseif ($count) {
            $feeding = $sink.WriteAsync($piece, 0, $count)
            $unflushed = $true
        } elseif ($unflushed) {
            $feeding = $sink.FlushAsync()
            $unflushed = $false
        }
    }
    # Children that are left behind may keep the output open for ever.
    if ($process.HasExited -and -not $after.IsRunning) { $after.Start() }
    $over = $after.IsRunning -and (-not $tasks.Length -or $after.ElapsedMilliseconds -gt 1000)
    foreach ($output in $outputs) {
        $length = [int] $output.pending.Length
        if ($length -and ($over -or $length -ge 1048576 -or $since.ElapsedMilliseconds -ge 50)) {
            Add-Output $output.name $output.pending.GetBuffer() $length
            $output.pending.SetLength(0)
            $flushed = $true
        }
    }
    if ($flushed) { $since.Restart(); $flushed = $false }
} until ($over)
$process.WaitForExit()
Exit-Runner $process.ExitCode
