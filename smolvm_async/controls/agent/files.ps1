# The guest's part of the transfers through a Windows guest's agent; see files.sh, whose functions
# and variables these are. Windows has no modes, and a new file has the rights of its directory.
# Windows PowerShell 5.1 on .NET Framework has all that is used here.
$ErrorActionPreference = 'Stop'
$lines = @($input)

function place {
    $target = $env:target
    if ($env:into -or [IO.Directory]::Exists("$target/")) {
        'inside'
        $target = "$target/$env:file_name"
    }
    make_temporary $target
}

function make_temporary($target) {
    $parent = $target.Substring(0, $target.LastIndexOf('/') + 1)
    if (-not $env:make_dirs -and -not [IO.Directory]::Exists($parent)) {
        throw "No such file or directory: $parent"
    }
    [void][IO.Directory]::CreateDirectory("$parent$env:leaf")
}

function place_content {
    if ([IO.Directory]::Exists($env:target)) { unlike $env:target }
    make_temporary $env:target
    [Console]::Out.Write($env:target)
}

function content_attributes { }

function unpack {
    [void][IO.Directory]::CreateDirectory("$env:temporary/tree")
    tar -xf "$env:temporary/data" -C "$env:temporary/tree"
    if ($LASTEXITCODE) { exit 1 }
    [IO.File]::Delete("$env:temporary/data")
}

function attributes {
    $time = [DateTimeOffset]::FromUnixTimeSeconds([long]$env:mtime).UtcDateTime
    [IO.File]::SetLastWriteTimeUtc("$env:temporary/data", $time)
}

function publish {
    merge "$env:temporary/$env:content" $env:target
    [IO.Directory]::Delete($env:temporary)
}

function merge($from, $to) {
    if ([IO.Directory]::Exists($from)) {
        if ([IO.File]::Exists($to)) { unlike $to }
        if (-not [IO.Directory]::Exists($to)) { return [IO.Directory]::Move($from, $to) }
        foreach ($path in [IO.Directory]::GetFileSystemEntries($from)) {
            merge $path "$to/$([IO.Path]::GetFileName($path))"
        }
        [IO.Directory]::Delete($from)
    }
    elseif ([IO.Directory]::Exists($to)) { unlike $to }
    else { replace $from $to }
}

function replace($from, $to) {
    if ([IO.File]::Exists($to)) { [IO.File]::Replace($from, $to, [NullString]::Value) }
    else { [IO.File]::Move($from, $to) }
}

function unlike($path) {
    [Console]::Error.WriteLine($path)
    exit 3
}

function discard {
    $parent = $env:target.Substring(0, [Math]::Max($env:target.LastIndexOf('/'), 0))
    foreach ($path in "$parent/$env:leaf", "$env:target/$env:leaf") {
        if ([IO.Directory]::Exists($path)) { Remove-Item -LiteralPath $path -Recurse -Force }
    }
}

function list {
    if (-not [IO.Directory]::Exists("$env:source/")) {
        return record (Get-Item -LiteralPath $env:source -Force) '.'
    }
    record ([IO.DirectoryInfo]"$env:source/") '.'
    contents "$env:source/" '.'
}

function contents($directory, $shown) {
    foreach ($item in Get-ChildItem -LiteralPath $directory -Force) {
        $name = "$shown/$($item.Name)"
        if (is_link $item) {
            tell "a1ff 0 0 $name"
            tell "link 0 0 $name"
            tell "to 0 0 $(@($item.Target)[0])`n."
        }
        else {
            record $item $name
            if ($item.PSIsContainer) { contents $item.FullName $name }
        }
    }
}

function is_link($item) {
    $item.LinkType -in 'SymbolicLink', 'Junction'
}

function entries {
    if (-not [IO.Directory]::Exists("$env:source/")) { throw 'it is not a directory' }
    record ([IO.DirectoryInfo]"$env:source/") '.'
    foreach ($item in Get-ChildItem -LiteralPath "$env:source/" -Force) {
        if (is_link $item) { tell "a1ff 0 0 ./$($item.Name)" }
        else { record $item "./$($item.Name)" }
    }
}

function info {
    record (Get-Item -LiteralPath $env:source -Force) '.'
}

function exists {
    if ([IO.File]::Exists($env:source) -or [IO.Directory]::Exists($env:source)) { 'yes' }
}

function remove {
    $item = Get-Item -LiteralPath $env:source -Force
    if ($env:recursive -and $item -is [IO.DirectoryInfo] -and -not (is_link $item)) {
        Remove-Item -LiteralPath $env:source -Recurse -Force
    }
    else { $item.Delete() }
}

function make_directory {
    if (-not $env:parents) {
        $parent = [IO.Path]::GetDirectoryName($env:source)
        if (-not [IO.Directory]::Exists($parent)) { throw "No such file or directory: $parent" }
        if (Test-Path -LiteralPath $env:source) { throw 'File exists' }
    }
    [void][IO.Directory]::CreateDirectory($env:source)
}

function record($item, $name) {
    $time = ([DateTimeOffset]$item.LastWriteTimeUtc).ToUnixTimeSeconds()
    if ($item -is [IO.DirectoryInfo]) { tell "41ed 0 $time $name" }
    else { tell "81a4 $($item.Length) $time $name" }
}

function tell($record) {
    [Console]::Out.Write("$env:word $record`n")
}

function read_own {
    $path = "$env:USERPROFILE/$env:file_name"
    if ([IO.File]::Exists($path)) { [Console]::Out.Write([IO.File]::ReadAllText($path)) }
}

function write_own {
    $path = "$env:USERPROFILE/$env:file_name"
    try {
        [IO.File]::WriteAllLines("$path.$env:leaf", [string[]]$lines)
        replace "$path.$env:leaf" $path
    }
    finally { [IO.File]::Delete("$path.$env:leaf") }
}

try { & $env:step }
catch {
    $cause = $_.Exception.GetBaseException()
    if (($cause.HResult -band 0xffff) -in 39, 112) { $text = 'No space left on device' }
    elseif (($cause.HResult -band 0xffff) -eq 145) { $text = 'the directory is not empty' }
    else { $text = $cause.Message }
    [Console]::Error.WriteLine($text)
    exit 1
}
