"""ELF kernels: headers checked, segments, the entry points they name."""

from __future__ import annotations

from collections.abc import Iterator

from ..core.errors import ImageError
from ..core.record import Record
from ..core.wire import Wire, b16, u16, u32, u64
from .placement import Segment, check_segments, round_up

MAGIC = b"\x7fELF"
REBUILD = "the file is damaged or was not copied completely: get it again"
PROGRAM = ("a program for Linux, not a kernel", "give a kernel (bzImage or vmlinux) with --kernel")
MAX_PROGRAMS = 256  # Linux has 5; e_phnum allows 65,535
MAX_NOTES = 64 << 10  # bytes of all together; Linux has 512

CLASS32, CLASS64 = 1, 2  # e_ident[EI_CLASS]
LITTLE_ENDIAN = 1  # e_ident[EI_DATA]
EM_386, EM_X86_64 = 3, 62
ET_EXEC, ET_DYN = 2, 3
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
NT_GNU_ABI_TAG = 1  # which system a program is for; kernels have none
XEN_ELFNOTE_PHYS32_ENTRY = 18  # xen/include/public/elfnote.h: the PVH entry

TYPES = {1: "an object file", 4: "a core dump"}
MACHINES = {  # e_machine of the kernels people have lying about
    2: "SPARC",
    8: "MIPS",
    20: "PowerPC",
    21: "PowerPC 64",
    22: "S390",
    40: "32-bit ARM",
    43: "SPARC 64",
    50: "IA-64",
    183: "ARM64",
    243: "RISC-V",
    258: "LoongArch",
}


class Header32(Wire):
    """Elf32_Ehdr."""

    ident: b16
    type: u16
    machine: u16
    version: u32
    entry: u32
    phoff: u32
    shoff: u32
    flags: u32
    ehsize: u16
    phentsize: u16
    phnum: u16
    shentsize: u16
    shnum: u16
    shstrndx: u16


class Header64(Wire):
    """Elf64_Ehdr."""

    ident: b16
    type: u16
    machine: u16
    version: u32
    entry: u64
    phoff: u64
    shoff: u64
    flags: u32
    ehsize: u16
    phentsize: u16
    phnum: u16
    shentsize: u16
    shnum: u16
    shstrndx: u16


class Program32(Wire):
    """Elf32_Phdr."""

    type: u32
    offset: u32
    vaddr: u32
    paddr: u32
    filesz: u32
    memsz: u32
    flags: u32
    align: u32


class Program64(Wire):
    """Elf64_Phdr."""

    type: u32
    flags: u32
    offset: u64
    vaddr: u64
    paddr: u64
    filesz: u64
    memsz: u64
    align: u64


class NoteHeader(Wire):
    """Elf64_Nhdr, the same in 32-bit files."""

    namesz: u32
    descsz: u32
    type: u32


class Elf(Record, frozen=True):
    """A checked ELF kernel."""

    data: memoryview
    bits: int  # 32 or 64
    entry: int  # e_entry; Linux puts the physical address of startup_64 there
    segments: tuple[Segment, ...]
    pvh_entry: int | None  # 32-bit physical entry, when there is the note
    file_end: int  # where segments and section headers end; what follows is not part of the ELF file

    @property
    def end(self) -> int:
        """The guest address after the last byte of the image."""
        return max(segment.end for segment in self.segments)

    def contains(self, address: int) -> bool:
        """Whether `address` is in what the file puts into guest memory."""
        return any(segment.base <= address < segment.base + len(segment.content) for segment in self.segments)

    def physical_entry(self) -> int:
        """e_entry, taken from virtual to physical where the file links the two apart (as GRUB does)."""
        for segment in self.segments:
            if segment.virtual <= self.entry < segment.virtual + segment.size:
                return self.entry - segment.virtual + segment.base
        return self.entry


def is_elf(data: memoryview) -> bool:
    return data[:4] == MAGIC


def parse(data: memoryview) -> Elf:
    """Raises ImageError for a file that is cut off, not for x86, no kernel, or contradicts itself."""
    header = _header(data)
    segments: list[Segment] = []
    pvh = None
    noted = 0
    end = header.shoff + header.shnum * header.shentsize
    for index, program in enumerate(_programs(data, header)):
        if program.type == PT_INTERP:
            raise ImageError(*PROGRAM)
        if program.type not in (PT_LOAD, PT_NOTE):
            continue
        end = max(end, program.offset + program.filesz)
        content = _content(data, index, program)
        if program.type == PT_NOTE:
            noted += len(content)
            if noted > MAX_NOTES:  # segments may share their bytes: the file's length bounds nothing
                raise ImageError(f"notes of more than {MAX_NOTES} bytes, which no kernel has", REBUILD)
            pvh = pvh or _pvh_entry(content, program.align)
        elif program.memsz:
            segments.append(Segment(program.paddr, content, program.memsz, program.vaddr))
    if not segments:
        raise ImageError("an ELF file with nothing to load", "give a kernel: vmlinux, not one of its parts")
    check_segments(segments)
    elf = Elf(data, 64 if isinstance(header, Header64) else 32, header.entry, tuple(segments), pvh, end)
    if pvh is not None and not (elf.contains(pvh) and pvh < 1 << 32):
        raise ImageError(f"its PVH entry {pvh:#x} is in no segment", REBUILD)
    return elf


def _header(data: memoryview) -> Header32 | Header64:
    """The file header of an x86 executable."""
    if len(data) < Header64.SIZE:
        raise ImageError(f"the file ends within its ELF header, after {len(data)} bytes", REBUILD)
    bits, order = data[4], data[5]
    if bits not in (CLASS32, CLASS64):
        raise ImageError(f"ELF class {bits}, neither 32 nor 64 bits", REBUILD)
    machine = int.from_bytes(data[18:20], "little" if order == LITTLE_ENDIAN else "big")
    if machine not in (EM_386, EM_X86_64) or order != LITTLE_ENDIAN:
        name = MACHINES.get(machine, f"another architecture (e_machine {machine})")
        raise ImageError(f"a kernel or program for {name}", "use one for x86-64")
    header = Header64.read(data) if bits == CLASS64 else Header32.read(data)
    if header.type not in (ET_EXEC, ET_DYN):
        kind = TYPES.get(header.type, f"an ELF file of type {header.type}")
        raise ImageError(f"{kind}, not a kernel", "give a linked kernel: vmlinux")
    return header


def _programs(data: memoryview, header: Header32 | Header64) -> Iterator[Program32 | Program64]:
    layout = Program64 if isinstance(header, Header64) else Program32
    if header.phnum > MAX_PROGRAMS:
        raise ImageError(f"{header.phnum} program headers, a kernel has at most {MAX_PROGRAMS}", REBUILD)
    if header.phentsize != layout.SIZE:
        raise ImageError(f"program headers of {header.phentsize} bytes instead of {layout.SIZE}", REBUILD)
    if header.phoff + header.phnum * layout.SIZE > len(data):
        raise ImageError("the file ends before its program headers do", REBUILD)
    for index in range(header.phnum):
        yield layout.read(data, header.phoff + index * layout.SIZE)


def _content(data: memoryview, index: int, program: Program32 | Program64) -> memoryview:
    """What the file has of a segment."""
    end = program.offset + program.filesz
    if end > len(data):
        raise ImageError(f"segment {index} ends at {end:#x}, the file has {len(data):#x} bytes", REBUILD)
    if program.type == PT_LOAD and program.memsz < program.filesz:
        sizes = f"in the file ({program.filesz:#x}) than in memory ({program.memsz:#x})"
        raise ImageError(f"segment {index} has more bytes {sizes}", REBUILD)
    return data[program.offset : end]


def _pvh_entry(notes: memoryview, align: int) -> int | None:
    """The PVH entry that the notes of a PT_NOTE segment give."""
    for name, kind, desc in _notes(notes, align):
        if (name, kind) == (b"GNU\0", NT_GNU_ABI_TAG):
            raise ImageError(*PROGRAM)
        if (name, kind) == (b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY):
            if len(desc) not in (4, 8):
                raise ImageError(f"a PVH note of {len(desc)} bytes instead of 4 or 8", REBUILD)
            return int.from_bytes(desc, "little")
    return None


def _notes(notes: memoryview, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    """(name, type, description) of each note of a PT_NOTE segment."""
    unit = 8 if align == 8 else 4  # gABI: aligned to p_align; everything but 8 has always meant 4
    at = 0
    while at + NoteHeader.SIZE <= len(notes):  # ends: each note has at least its header, and there are MAX_NOTES bytes
        note = NoteHeader.read(notes, at)
        name = at + NoteHeader.SIZE
        desc = round_up(name + note.namesz, unit)
        end = desc + note.descsz
        if end > len(notes):
            raise ImageError(f"the note at {at:#x} ends after the notes do", REBUILD)
        yield bytes(notes[name : name + note.namesz]), note.type, bytes(notes[desc:end])
        at = round_up(end, unit)
