"""Who listens where: shared by the tests of what a run opens to the network."""

import ipaddress

import psutil


def process_tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def listening(pid: int) -> set[tuple[str, str, int]]:
    """(process, address, port) of every TCP or UDP socket on which a process and its descendants wait for others."""
    found = set()
    for process in process_tree(pid):
        try:
            name = " ".join(process.cmdline())[:60]
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN or (connection.status == psutil.CONN_NONE and not connection.raddr):
                    found.add((name, connection.laddr.ip, connection.laddr.port))
        except psutil.NoSuchProcess:
            continue
    return found


def beyond_loopback(sockets: set[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Those that another machine could reach."""
    return sorted(entry for entry in sockets if not _is_loopback(entry[1]))


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def command_lines(pid: int) -> str:
    """What `ps` shows of a process and its descendants."""
    lines = []
    for process in process_tree(pid):
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return "\n".join(lines)
