"""The messages of the two services that a sandbox offers, `process.Process` and `filesystem.Filesystem`, as clients of
E2B's API number and name their fields. A table, of which protobuf's own classes are made: they read and write both
codecs.

A field is "name type number", with "*" behind the type for a list, "?" for one whose absence means something, and
"|group" at the end for one of several. A type with a dot in front is another message of the package. *any thread*
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, message_factory, timestamp_pb2
from google.protobuf.descriptor_pool import DescriptorPool

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "string": _Field.TYPE_STRING, "bytes": _Field.TYPE_BYTES, "bool": _Field.TYPE_BOOL, "uint32": _Field.TYPE_UINT32,
    "int64": _Field.TYPE_INT64, "sint32": _Field.TYPE_SINT32,
}  # fmt: skip

PROCESS = {
    "PTY": ("size .PTY.Size 1",),
    "PTY.Size": ("cols uint32 1", "rows uint32 2"),
    "ProcessConfig": ("cmd string 1", "args string* 2", "envs map 3", "cwd string? 4"),
    "ListRequest": (),
    "ProcessInfo": ("config .ProcessConfig 1", "pid uint32 2", "tag string? 3"),
    "ListResponse": ("processes .ProcessInfo* 1",),
    "StartRequest": ("process .ProcessConfig 1", "pty .PTY? 2", "tag string? 3", "stdin bool? 4"),
    "UpdateRequest": ("process .ProcessSelector 1", "pty .PTY? 2"),
    "UpdateResponse": (),
    "ProcessEvent": (
        "start .ProcessEvent.StartEvent 1 |event",
        "data .ProcessEvent.DataEvent 2 |event",
        "end .ProcessEvent.EndEvent 3 |event",
        "keepalive .ProcessEvent.KeepAlive 4 |event",
    ),
    "ProcessEvent.StartEvent": ("pid uint32 1",),
    "ProcessEvent.DataEvent": ("stdout bytes 1 |output", "stderr bytes 2 |output", "pty bytes 3 |output"),
    "ProcessEvent.EndEvent": ("exit_code sint32 1", "exited bool 2", "status string 3", "error string? 4"),
    "ProcessEvent.KeepAlive": (),
    "StartResponse": ("event .ProcessEvent 1",),
    "ConnectResponse": ("event .ProcessEvent 1",),
    "SendInputRequest": ("process .ProcessSelector 1", "input .ProcessInput 2"),
    "SendInputResponse": (),
    "ProcessInput": ("stdin bytes 1 |input", "pty bytes 2 |input"),
    "StreamInputRequest": (
        "start .StreamInputRequest.StartEvent 1 |event",
        "data .StreamInputRequest.DataEvent 2 |event",
        "keepalive .StreamInputRequest.KeepAlive 3 |event",
    ),
    "StreamInputRequest.StartEvent": ("process .ProcessSelector 1",),
    "StreamInputRequest.DataEvent": ("input .ProcessInput 2",),
    "StreamInputRequest.KeepAlive": (),
    "StreamInputResponse": (),
    "SendSignalRequest": ("process .ProcessSelector 1", "signal .Signal 2"),
    "SendSignalResponse": (),
    "CloseStdinRequest": ("process .ProcessSelector 1",),
    "CloseStdinResponse": (),
    "ConnectRequest": ("process .ProcessSelector 1",),
    "ProcessSelector": ("pid uint32 1 |selector", "tag string 2 |selector"),
}
PROCESS_ENUMS = {"Signal": {"SIGNAL_UNSPECIFIED": 0, "SIGNAL_SIGTERM": 15, "SIGNAL_SIGKILL": 9}}

FILESYSTEM = {
    "MoveRequest": ("source string 1", "destination string 2"),
    "MoveResponse": ("entry .EntryInfo 1",),
    "MakeDirRequest": ("path string 1",),
    "MakeDirResponse": ("entry .EntryInfo 1",),
    "RemoveRequest": ("path string 1",),
    "RemoveResponse": (),
    "StatRequest": ("path string 1",),
    "StatResponse": ("entry .EntryInfo 1",),
    "EntryInfo": (
        "name string 1", "type .FileType 2", "path string 3", "size int64 4", "mode uint32 5", "permissions string 6",
        "owner string 7", "group string 8", "modified_time time 9", "symlink_target string? 10", "metadata map 11",
        "is_symlink bool 12",
    ),
    "ListDirRequest": ("path string 1", "depth uint32 2"),
    "ListDirResponse": ("entries .EntryInfo* 1",),
    "WatchDirRequest": ("path string 1", "recursive bool 2", "include_entry bool 3", "allow_network_mounts bool 4"),
    "FilesystemEvent": ("name string 1", "type .EventType 2", "entry .EntryInfo? 3"),
    "WatchDirResponse": (
        "start .WatchDirResponse.StartEvent 1 |event",
        "filesystem .FilesystemEvent 2 |event",
        "keepalive .WatchDirResponse.KeepAlive 3 |event",
    ),
    "WatchDirResponse.StartEvent": (),
    "WatchDirResponse.KeepAlive": (),
    "CreateWatcherRequest": (
        "path string 1", "recursive bool 2", "include_entry bool 3", "allow_network_mounts bool 4",
    ),
    "CreateWatcherResponse": ("watcher_id string 1",),
    "GetWatcherEventsRequest": ("watcher_id string 1",),
    "GetWatcherEventsResponse": ("events .FilesystemEvent* 1",),
    "RemoveWatcherRequest": ("watcher_id string 1",),
    "RemoveWatcherResponse": (),
}  # fmt: skip
FILESYSTEM_ENUMS = {
    "FileType": {
        "FILE_TYPE_UNSPECIFIED": 0, "FILE_TYPE_FILE": 1, "FILE_TYPE_DIRECTORY": 2, "FILE_TYPE_SYMLINK": 3,
    },
    "EventType": {
        "EVENT_TYPE_UNSPECIFIED": 0, "EVENT_TYPE_CREATE": 1, "EVENT_TYPE_WRITE": 2, "EVENT_TYPE_REMOVE": 3,
        "EVENT_TYPE_RENAME": 4, "EVENT_TYPE_CHMOD": 5,
    },
}  # fmt: skip


def _add_field(message: Any, package: str, enums: dict[str, Any], text: str) -> None:
    name, kind, number, *group = text.split()
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind.endswith("*") or kind == "map":
        field.label = _Field.LABEL_REPEATED
    if kind == "map":
        entry = message.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        for at, part in enumerate(("key", "value")):
            entry.field.add(name=part, number=at + 1, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_STRING)
        field.type, field.type_name = _Field.TYPE_MESSAGE, entry.name
        return
    is_optional, plain = kind.endswith("?"), kind.rstrip("*?")
    if plain == "time":
        field.type, field.type_name = _Field.TYPE_MESSAGE, ".google.protobuf.Timestamp"
    elif plain.startswith("."):
        field.type = _Field.TYPE_ENUM if plain[1:] in enums else _Field.TYPE_MESSAGE
        field.type_name = f".{package}{plain}"
    else:
        field.type = _SCALARS[plain]
    if group:
        name = group[0][1:]
        known = [one.name for one in message.oneof_decl]
        if name not in known:
            message.oneof_decl.add(name=name)
            known.append(name)
        field.oneof_index = known.index(name)
    elif is_optional:
        field.proto3_optional = True


def _add_optionals(message: Any) -> None:
    """A field whose absence means something is alone in a group of its own, behind the others (descriptor.proto)."""
    for field in message.field:
        if field.proto3_optional:
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field.name}")


def _make(package: str, messages: dict[str, Any], enums: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Message classes by name."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    file.dependency.append("google/protobuf/timestamp.proto")
    for name, values in enums.items():
        enum = file.enum_type.add(name=name)
        for word, number in values.items():
            enum.value.add(name=word, number=number)
    made: dict[str, Any] = {}
    for name, fields in messages.items():
        outer, _, inner = name.rpartition(".")
        message = made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=inner)
        made[name] = message
        for text in fields:
            _add_field(message, package, enums, text)
            if message.nested_type and message.field[-1].type_name == message.nested_type[-1].name:
                message.field[-1].type_name = f".{package}.{name}.{message.nested_type[-1].name}"
        _add_optionals(message)
    pool = DescriptorPool()
    time = descriptor_pb2.FileDescriptorProto()
    timestamp_pb2.DESCRIPTOR.CopyToProto(time)
    pool.Add(time)
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages
    }


process: dict[str, Any] = _make("process", PROCESS, PROCESS_ENUMS)
"""Classes by name, "StartRequest" and so on."""
filesystem: dict[str, Any] = _make("filesystem", FILESYSTEM, FILESYSTEM_ENUMS)
