"""A machine that runs PTX on NumPy: the code that Triton compiles for an NVIDIA GPU, on a computer that has none.

All threads of a block execute an instruction at once; where they part, those that are furthest behind go first. Copies
and matrix products that PTX calls asynchronous take effect when they are waited for and not a moment sooner, so that
code which does not wait gets wrong numbers. Stopped with MachineError are accesses outside of the tensors, and
misaligned ones; bytes of the shared memory that two warps touch, one of them writing, without a barrier in between; a
product that reads what threads stored, without a proxy fence; a barrier that not all threads reach; a number that one
block writes and another reads or writes.

It knows the instructions and forms that Triton makes of this project's kernels for sm_80 and sm_90, and names others.
What it does not model: time, caches, what the assembler makes of PTX (it may fuse more multiplications with additions),
and the last bits of approximate instructions (ex2 and divisions are exact here). Source: PTX ISA 8.8, section
9.7.
"""

import gc
import re
from collections import Counter, deque

import numpy as np
import torch

WARP = 32
SEVERAL = -2  # blocks have read a byte
NUMBERS = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64,
    "u64": np.uint64, "s64": np.int64, "f64": np.float64, "f16": np.float16,
}  # fmt: skip


class MachineError(Exception):
    """What a GPU would do wrong or not at all, with the line of PTX."""


def bfloat16_to_float32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(number):
    """Rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(number, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(number), np.uint16(0x7FFF), rounded)


def cut_off(sums):
    """float64 to float32 as matrix units round their sums: towards zero (Fasi et al. 2021, 10.7717/peerj-cs.330)."""
    near = sums.astype(np.float32)
    return np.where(np.abs(near) > np.abs(sums), np.nextafter(near, np.float32(0)), near)


def to_tf32(number):
    """What a matrix unit reads of a 32-bit operand: 10 bits of mantissa, the others cut off."""
    return (number.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def unpacked(registers, kind):
    """32-bit registers [threads, R] as the float64 numbers [threads, R * numbers a register] that they hold."""
    registers = np.ascontiguousarray(registers)
    if kind == "tf32":
        return to_tf32(registers.view(np.float32)).astype(np.float64)
    halves = registers.view(np.uint16)
    return (bfloat16_to_float32(halves) if kind == "bf16" else halves.view(np.float16)).astype(np.float64)


class Memory:
    """The tensors that a launch names, at their own addresses."""

    def __init__(self, tensors):
        self.views = {}
        self.writer, self.reader = {}, {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self.views:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.views[storage.data_ptr()] = raw.numpy()
            self.writer[storage.data_ptr()] = np.full(storage.nbytes(), -1, np.int32)
            self.reader[storage.data_ptr()] = np.full(storage.nbytes(), -1, np.int32)

    def holder(self, address, size):
        """Where the tensor begins that holds these bytes; tables of pointers name ones that are no arguments."""
        for start, view in self.views.items():
            if start <= address and address + size <= start + len(view):
                return start
        for each in gc.get_objects():
            if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
                storage = each.untyped_storage()
                if storage.data_ptr() <= address and address + size <= storage.data_ptr() + storage.nbytes():
                    self.add(each)
                    return self.holder(address, size)
        raise MachineError(f"address {address:#x}, {size} bytes, lies in no tensor")

    def place(self, addresses, size):
        """The tensor of all these accesses, and their bytes in it, [lanes, size]."""
        if (addresses % np.uint64(size)).any():
            raise MachineError(f"an access of {size} bytes at an address that is no multiple of them")
        start = self.holder(int(addresses.min()), size)
        if int(addresses.max()) + size > start + len(self.views[start]):
            raise MachineError(f"accesses of one instruction reach beyond a tensor of {len(self.views[start])} bytes")
        return start, (addresses - np.uint64(start)).astype(np.int64)[:, None] + np.arange(size)

    def load(self, addresses, size, block):
        """[lanes, size] bytes"""
        start, touched = self.place(addresses, size)
        writer = self.writer[start][touched]
        if ((writer != -1) & (writer != block)).any():
            raise MachineError("a block reads what another one has written")
        reader = self.reader[start][touched]
        self.reader[start][touched] = np.where((reader == -1) | (reader == block), block, SEVERAL)
        return self.views[start][touched]

    def store(self, addresses, data, block):
        start, touched = self.place(addresses, data.shape[1])
        for others in (self.writer[start][touched], self.reader[start][touched]):
            if ((others != -1) & (others != block)).any():
                raise MachineError("a block writes what another one has read or written")
        self.writer[start][touched] = block
        self.views[start][touched] = data
        if (self.views[start][touched] != data).any():
            raise MachineError("two threads of one instruction write different bits to one place of a tensor")


class Shared:
    """A block's shared memory, and who has touched it since the last barrier."""

    def __init__(self, size):
        self.bytes = np.full(size, 0xFF, np.uint8)  # NaN as any type
        self.writer = np.full(size, -1, np.int16)
        self.readers = np.zeros(size, np.uint32)
        self.in_flight = np.zeros(size, np.bool_)
        self.unfenced = np.zeros(size, np.bool_)

    def barrier(self):
        self.writer.fill(-1)
        self.readers.fill(0)

    def touched(self, addresses, size):
        if size and (addresses % min(size, 16)).any():
            raise MachineError(f"an address in the shared memory is no multiple of {size}")
        touched = addresses.astype(np.int64)[:, None] + np.arange(size)
        if touched.size and touched.max() >= len(self.bytes):
            raise MachineError(f"shared memory has {len(self.bytes)} bytes, {touched.max()} is addressed")
        return touched

    def note_read(self, touched, warps):
        if self.in_flight[touched].any():
            raise MachineError("shared memory is read while a copy into it has not been waited for")
        writer = self.writer[touched]
        if ((writer != -1) & (writer != warps[:, None])).any():
            raise MachineError("a warp reads shared memory that another wrote, without a barrier")
        np.bitwise_or.at(self.readers, touched, (np.uint32(1) << warps.astype(np.uint32))[:, None])

    def note_write(self, touched, data, warps):
        """Two warps may write the same bytes to the same place, as Triton has them do where they hold copies."""
        writer, own = self.writer[touched], (np.uint32(1) << warps.astype(np.uint32))[:, None]
        foreign = (writer != -1) & (writer != warps[:, None]) & (self.bytes[touched] != data)
        if foreign.any() or (self.readers[touched] & ~own).any():
            raise MachineError("a warp writes shared memory that another read or wrote, without a barrier")

    def load(self, addresses, size, warps):
        """[lanes, size] bytes"""
        touched = self.touched(addresses, size)
        self.note_read(touched, warps)
        return self.bytes[touched]

    def store(self, addresses, data, warps):
        touched = self.touched(addresses, data.shape[1])
        if self.in_flight[touched].any():
            raise MachineError("shared memory is written while a copy into it has not been waited for")
        self.note_write(touched, data, warps)
        self.bytes[touched] = data
        if (self.bytes[touched] != data).any():
            raise MachineError("two lanes of one instruction write different bits to one place of the shared memory")
        self.writer[touched] = warps[:, None]
        self.unfenced[touched] = True

    def begin_copy(self, addresses, data, warps):
        touched = self.touched(addresses, data.shape[1])
        self.note_write(touched, data, warps)
        self.in_flight[touched] = True
        return touched, data, warps

    def end_copy(self, touched, data, warps):
        """Products may read it without a proxy fence, as in the pipelines of CUTLASS and of Triton 3.6."""
        self.bytes[touched] = data
        self.writer[touched] = warps[:, None]
        self.in_flight[touched] = False
        self.unfenced[touched] = False


class Registers(dict):
    """[threads] numbers by name. One that is read before it is written (LLVM leaves some undefined) is full of ones."""

    def __init__(self, threads):
        self.threads = threads

    def __missing__(self, name):
        sizes = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}
        dtype = sizes[name.rstrip("0123456789")]
        return np.full(self.threads, np.iinfo(dtype).max if dtype != np.bool_ else True, dtype)


class Block:
    """What the threads of one block hold while they run."""

    def __init__(self, program, index, grid, memory, arguments, shared_size):
        self.threads = program.threads
        self.memory, self.arguments, self.shared = memory, arguments, Shared(shared_size)
        self.number = index[0] + grid[0] * (index[1] + grid[1] * index[2])
        self.lanes = np.arange(self.threads)
        self.warps = (self.lanes // WARP).astype(np.int16)
        zero = np.zeros(self.threads, np.uint32)
        self.registers = Registers(self.threads)
        self.registers |= {
            "%tid.x": self.lanes.astype(np.uint32), "%tid.y": zero, "%tid.z": zero, "%ntid.x": zero + program.threads,
            **{f"%ctaid.{axis}": zero + np.uint32(i) for axis, i in zip("xyz", index, strict=True)},
            **{f"%nctaid.{axis}": zero + np.uint32(n) for axis, n in zip("xyz", grid, strict=True)},
        }  # fmt: skip
        self.copies, self.copy_groups = [], deque()
        self.products, self.product_groups = [], deque()

    def write(self, register, numbers, mask):
        if mask is not None:
            numbers = np.where(mask, numbers, self.registers[register].view(numbers.dtype))
        self.registers[register] = numbers

    def run(self, code, executed):
        """From the first instruction to the last; `position` is that of each thread where they differ."""
        position, end, warps = 0, len(code), self.threads // WARP
        while not isinstance(position, int) or position < end:
            if isinstance(position, int):
                here, mask = position, None
            else:
                here = int(position.min())
                mask = position == here
                if mask.all():
                    position, mask = here, None
                    continue
            instruction = code[here]
            if instruction.name[:4] != "mov.":
                active = warps if mask is None else int(mask.reshape(-1, WARP).any(axis=1).sum())
                executed[instruction.source] += active
            try:
                target = instruction(self, mask)
            except MachineError as error:
                raise MachineError(f"{error}: {instruction.text}") from None
            if target is None:
                following = here + 1
            elif isinstance(target, tuple):  # a branch that some threads take
                taken, there = target
                following = np.where(taken, there, here + 1)
            else:
                following = target
            if mask is not None:
                following = np.where(mask, following, position)
            elif not isinstance(following, int) and (following == following[0]).all():
                following = int(following[0])
            position = following


class Instruction:
    """One line of PTX: `@predicate operation operands`."""

    def __init__(self, text, labels, source):
        self.text, self.source = text, source
        guard, body = re.fullmatch(r"(?:@(!?%\w+)\s+)?(.*);", text).groups()
        self.guard = guard and guard.lstrip("!")
        self.negated = bool(guard) and guard[0] == "!"
        name, _, operands = body.partition(" ") if "\t" not in body else body.partition("\t")
        self.name, self.labels = name.strip(), labels
        self.operands = split_operands(operands)
        operation, *self.modifiers = self.name.split(".")
        method = getattr(self, f"do_{operation}", None)
        if method is None:
            raise MachineError(f"unknown instruction: {text}")
        self.method = method

    def __call__(self, block, mask):
        if self.guard:
            guard = block.registers[self.guard] ^ self.negated
            if self.method == self.do_bra:
                return self.branch(guard, mask)
            mask = guard if mask is None else mask & guard
            if mask.all():
                mask = None
            elif not mask.any():
                return None
        return self.method(block, mask)

    # Operands

    def read(self, block, operand, dtype):
        if dtype == "bf16":
            return bfloat16_to_float32(self.read(block, operand, np.uint16))
        if operand[0] == "%":
            value = block.registers[operand]
            if value.dtype.itemsize != np.dtype(dtype).itemsize:
                raise MachineError(f"{operand} has {value.dtype.itemsize} bytes, not {np.dtype(dtype).itemsize}")
            return value.view(dtype)
        return np.full(block.threads, immediate(operand, dtype))

    def typed(self):
        """The type that an operation works on is the last of its modifiers."""
        last = self.modifiers[-1]
        if last == "bf16":
            return last
        if last not in NUMBERS:
            raise MachineError(f"type {last} is not known here")
        return NUMBERS[last]

    def sources(self, block, dtype=None):
        return [self.read(block, operand, dtype or self.typed()) for operand in self.operands[1:]]

    def address(self, block, operand):
        base, _, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(\+\s*(-?\d+))?\s*\]", operand).groups()
        offset = int(offset or 0)
        if base[0] == "%":
            addresses = block.registers[base]
            return (addresses.astype(np.int64) + offset).astype(np.uint64)
        return np.full(block.threads, immediate(base, np.int64) + offset, np.uint64)

    # Control

    def branch(self, taken, mask):
        target = self.labels[self.operands[0]]
        active = taken if mask is None else taken[mask]
        if active.all():
            return target
        return (taken, target) if active.any() else None

    def do_bra(self, block, mask):
        return self.labels[self.operands[0]]

    def do_ret(self, block, mask):
        return self.labels["end"]

    def do_bar(self, block, mask):
        if self.modifiers[0] == "warp":
            return
        if mask is not None:
            raise MachineError("a barrier that not all threads reach")
        block.shared.barrier()

    def do_fence(self, block, mask):
        block.shared.unfenced.fill(False)

    # Arithmetic

    def result(self, block, mask, numbers, dtype=None):
        dtype = dtype or self.typed()
        numbers = float32_to_bfloat16(numbers) if dtype == "bf16" else np.asarray(numbers, dtype)
        block.write(self.operands[0], numbers, mask)

    def wide(self, block):
        """Sources as 64-bit integers, of what are 16- or 32-bit ones."""
        return [each.astype(np.int64 if self.modifiers[-1][0] == "s" else np.uint64) for each in self.sources(block)]

    def do_mov(self, block, mask):
        target, source = self.operands
        dtype = self.typed()
        if source[0] == "{":  # lower halves first
            parts = [block.registers[each] for each in split_operands(source[1:-1])]
            parts = [each.view(f"u{each.dtype.itemsize}") for each in parts]  # of one type, or they would be widened
            return block.write(target, np.stack(parts, axis=1).view(dtype)[:, 0], mask)
        numbers = self.read(block, source, dtype)
        if target[0] == "{":
            targets = split_operands(target[1:-1])
            parts = np.ascontiguousarray(numbers)[:, None].view(f"u{numbers.dtype.itemsize // len(targets)}")
            for i, each in enumerate(targets):
                if each != "_":
                    block.write(each, parts[:, i].copy(), mask)
        else:
            block.write(target, numbers, mask)

    def do_add(self, block, mask):
        if self.modifiers[-1] in ("s16x2", "u16x2"):
            halves = [each.copy()[:, None].view(np.uint16) for each in self.sources(block, np.uint32)]
            return self.result(block, mask, (halves[0] + halves[1]).view(np.uint32)[:, 0], np.uint32)
        a, b = self.sources(block)
        self.result(block, mask, a + b)

    def do_sub(self, block, mask):
        a, b = self.sources(block)
        self.result(block, mask, a - b)

    def do_mul(self, block, mask):
        if "wide" in self.modifiers:
            a, b = self.wide(block)
            return self.result(block, mask, a * b, {2: np.int32, 4: np.int64}[np.dtype(self.typed()).itemsize])
        if "hi" in self.modifiers:
            a, b = self.wide(block)
            return self.result(block, mask, (a * b) >> (8 * np.dtype(self.typed()).itemsize))
        a, b = self.sources(block)
        self.result(block, mask, a * b)

    def do_mad(self, block, mask):
        if "wide" in self.modifiers:
            a, b = (self.read(block, each, self.typed()) for each in self.operands[1:3])
            wide = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}[self.modifiers[-1]]
            c = self.read(block, self.operands[3], wide)
            return self.result(block, mask, a.astype(wide) * b.astype(wide) + c, wide)
        a, b, c = self.sources(block)
        self.result(block, mask, a * b + c)

    def do_fma(self, block, mask):
        """One rounding: float64 holds a product of two float32 numbers exactly."""
        a, b, c = (each.astype(np.float64) for each in self.sources(block))
        self.result(block, mask, a * b + c)

    def do_div(self, block, mask):
        a, b = self.sources(block)
        self.result(block, mask, a // b if np.issubdtype(a.dtype, np.integer) else a / b)

    def do_neg(self, block, mask):
        (a,) = self.sources(block)
        self.result(block, mask, -a)

    def do_abs(self, block, mask):
        (a,) = self.sources(block)
        self.result(block, mask, np.abs(a))

    def do_min(self, block, mask):
        a, b = self.sources(block)
        self.result(block, mask, (np.minimum if "NaN" in self.modifiers else np.fmin)(a, b))

    def do_max(self, block, mask):
        a, b = self.sources(block)
        self.result(block, mask, (np.maximum if "NaN" in self.modifiers else np.fmax)(a, b))

    def do_ex2(self, block, mask):
        (a,) = self.sources(block)
        self.result(block, mask, np.exp2(a.astype(np.float64)))

    def do_sqrt(self, block, mask):
        (a,) = self.sources(block)
        self.result(block, mask, np.sqrt(a.astype(np.float64)))

    # Bits and choices

    def do_and(self, block, mask):
        a, b = self.sources(block)
        self.result(block, mask, a & b)

    def do_or(self, block, mask):
        a, b = self.sources(block)
        self.result(block, mask, a | b)

    def do_xor(self, block, mask):
        a, b = self.sources(block)
        self.result(block, mask, a ^ b)

    def do_not(self, block, mask):
        (a,) = self.sources(block)
        self.result(block, mask, ~a)

    def shifted(self, block, function):
        a = self.read(block, self.operands[1], self.typed())
        count = self.read(block, self.operands[2], np.uint32)
        bits = 8 * a.dtype.itemsize
        within = function(a, np.minimum(count, bits - 1).astype(a.dtype))
        emptied = a >> (bits - 1) if np.issubdtype(a.dtype, np.signedinteger) else np.zeros_like(a)
        return np.where(count < bits, within, emptied if function is np.right_shift else np.zeros_like(a))

    def do_shl(self, block, mask):
        self.result(block, mask, self.shifted(block, np.left_shift))

    def do_shr(self, block, mask):
        self.result(block, mask, self.shifted(block, np.right_shift))

    def do_bfe(self, block, mask):
        a = self.read(block, self.operands[1], self.typed())
        start, length = (self.read(block, each, np.uint32).astype(np.int64) for each in self.operands[2:])
        field = (a.astype(np.int64) >> start) & ((np.int64(1) << length) - 1)
        if self.modifiers[-1] == "s32":
            field = np.where((length > 0) & (field >> np.maximum(length - 1, 0) == 1), field - (1 << length), field)
        self.result(block, mask, field.astype(self.typed()))

    def do_bfi(self, block, mask):
        inserted, base = (self.read(block, each, np.uint32) for each in self.operands[1:3])
        start, length = (self.read(block, each, np.uint32) for each in self.operands[3:])
        field = (((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << start.astype(np.uint64)).astype(
            np.uint32
        )
        self.result(block, mask, (base & ~field) | ((inserted << start) & field))

    def do_prmt(self, block, mask):
        """Any four of the eight bytes of two registers; with bit 3 of a selector its byte's sign instead."""
        a, b, selector = self.sources(block, np.uint32)
        taken = np.stack([a, b], axis=1).view(np.uint8)
        result = np.empty((block.threads, 4), np.uint8)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)) & 0xF
            byte = taken[block.lanes, choice & 7]
            result[:, i] = np.where(choice & 8, (byte.view(np.int8) >> 7).view(np.uint8), byte)
        self.result(block, mask, result.view(np.uint32)[:, 0])

    def do_setp(self, block, mask):
        if self.modifiers[-1] == "bf16x2":
            a, b = (self.read(block, each, np.uint32) for each in self.operands[1:3])
            for shift, target in zip((0, 16), self.operands[0].split("|"), strict=True):
                halves = (bfloat16_to_float32((each >> shift).astype(np.uint16)) for each in (a, b))
                block.write(target, self.compared(*halves), mask)
            return
        a, b = (self.read(block, each, self.typed()) for each in self.operands[1:3])
        numbers = self.compared(a, b)
        if "and" in self.modifiers:
            numbers &= self.read(block, self.operands[3], np.bool_)
        block.write(self.operands[0], numbers, mask)

    def compared(self, a, b):
        comparison = self.modifiers[0]
        compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
                   "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
                   "hs": np.greater_equal, "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
                   "nan": lambda a, b: np.isnan(a) | np.isnan(b)}  # fmt: skip
        if comparison in compare:
            numbers = compare[comparison](a, b)
        else:  # the unordered ones hold for NaN
            numbers = compare[comparison[:-1]](a, b) | np.isnan(a) | np.isnan(b)
        if comparison == "ne" and np.issubdtype(a.dtype, np.floating):
            numbers &= ~(np.isnan(a) | np.isnan(b))
        return numbers

    def do_selp(self, block, mask):
        a, b = (self.read(block, each, self.typed()) for each in self.operands[1:3])
        self.result(block, mask, np.where(block.registers[self.operands[3]], a, b))

    def do_cvt(self, block, mask):
        target, source = self.modifiers[-2:]
        if target in ("bf16x2", "f16x2"):  # the first operand in the upper half
            halves = [self.read(block, each, np.float32) for each in reversed(self.operands[1:])]
            convert = float32_to_bfloat16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            packed = np.stack([convert(each) for each in halves], axis=1)
            return block.write(self.operands[0], packed.view(np.uint32)[:, 0], mask)
        if source == "bf16":
            numbers = bfloat16_to_float32(self.read(block, self.operands[1], np.uint16))
        elif source == "tf32" or target == "tf32":
            numbers = self.read(block, self.operands[1], np.float32)
        else:
            numbers = self.read(block, self.operands[1], self.widest(block, NUMBERS[source]))
            if numbers.dtype.itemsize != np.dtype(NUMBERS[source]).itemsize:  # the lower part of a wider register
                numbers = numbers.astype(NUMBERS[source])
        if target == "bf16":
            return block.write(self.operands[0], float32_to_bfloat16(numbers), mask)
        if target == "tf32":  # to the nearest, ties away from zero
            rounded = (numbers.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
            return block.write(self.operands[0], np.where(np.isfinite(numbers), rounded, numbers.view(np.uint32)), mask)
        dtype = NUMBERS[target]
        if np.issubdtype(numbers.dtype, np.floating) and np.issubdtype(dtype, np.integer):
            numbers = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[self.modifiers[0]](numbers)
            numbers = np.clip(numbers.astype(np.float64), np.iinfo(dtype).min, np.iinfo(dtype).max)
        self.result(block, mask, numbers.astype(dtype), dtype)

    def widest(self, block, dtype):
        """cvt may read a register that is wider than its type."""
        if self.operands[1][0] != "%":
            return dtype
        register = block.registers[self.operands[1]]
        if register.dtype.itemsize == np.dtype(dtype).itemsize:
            return dtype
        return (
            f"i{register.dtype.itemsize}" if np.issubdtype(dtype, np.signedinteger) else f"u{register.dtype.itemsize}"
        )

    # Between the threads of a warp

    def whole_warps(self, block, mask):
        if mask is not None and not np.isin(mask.reshape(-1, WARP).sum(axis=1), (0, WARP)).all():
            raise MachineError("an instruction for whole warps, of which some threads are elsewhere")

    def do_shfl(self, block, mask):
        self.whole_warps(block, mask)
        a = self.read(block, self.operands[1], np.uint32)
        other, clamp = (self.read(block, each, np.uint32).astype(np.int64) for each in self.operands[2:4])
        lane = block.lanes % WARP
        segment = (clamp >> 8) & 31
        highest = (lane & segment) | (clamp & 31 & ~segment)
        source = {"bfly": lane ^ other, "idx": (lane & segment) | (other & ~segment)}[self.modifiers[1]]
        source = np.where(source <= highest, source, lane) + block.lanes - lane
        self.result(block, mask, a[source], np.uint32)

    def do_redux(self, block, mask):
        self.whole_warps(block, mask)
        a = self.read(block, self.operands[1], self.typed()).reshape(-1, WARP)
        reduced = {"min": a.min}[self.modifiers[1]](axis=1)
        self.result(block, mask, np.repeat(reduced, WARP))

    # Memory

    def do_ld(self, block, mask):
        space, targets = self.modifiers[0], self.operands[0]
        targets = split_operands(targets[1:-1]) if targets[0] == "{" else [targets]
        dtype = self.typed()
        if space == "param":
            name = re.fullmatch(r"\[(\w+)\]", self.operands[1]).group(1)
            number = block.arguments[name]
            if self.modifiers[-1] == "s32" and targets[0].startswith("%rd"):  # extended
                return block.write(targets[0], np.full(block.threads, np.int64(np.int32(number))), mask)
            number = np.float32(number).view(np.uint32) if isinstance(number, float) else number
            return block.write(targets[0], np.full(block.threads, np.array(number).astype(dtype)), mask)
        active = block.lanes if mask is None else np.flatnonzero(mask)
        addresses = self.address(block, self.operands[1])[active]
        size = np.dtype(dtype).itemsize * len(targets)
        if space == "shared":
            data = block.shared.load(addresses, size, block.warps[active])
        else:
            data = block.memory.load(addresses, size, block.number)
        numbers = np.ascontiguousarray(data).view(dtype)
        for i, target in enumerate(targets):
            whole = np.zeros(block.threads, dtype)
            whole[active] = numbers[:, i]
            wanted = 2 if target.startswith("%rs") else 8 if target.startswith("%rd") else 4
            if wanted != whole.dtype.itemsize:
                whole = whole.astype(f"{'i' if np.issubdtype(dtype, np.signedinteger) else 'u'}{wanted}")
            block.write(target, whole, mask)

    def do_st(self, block, mask):
        space, dtype = self.modifiers[0], self.typed()
        sources = self.operands[1]
        sources = split_operands(sources[1:-1]) if sources[0] == "{" else [sources]
        active = block.lanes if mask is None else np.flatnonzero(mask)
        addresses = self.address(block, self.operands[0])[active]
        size = np.dtype(dtype).itemsize
        numbers = []
        for each in sources:
            number = block.registers[each] if each[0] == "%" else np.full(block.threads, immediate(each, dtype))
            numbers.append((number.astype(dtype) if number.dtype.itemsize != size else number.view(dtype))[active])
        data = np.stack(numbers, axis=1).view(np.uint8)
        if space == "shared":
            block.shared.store(addresses, data, block.warps[active])
        else:
            block.memory.store(addresses, data, block.number)

    def do_cp(self, block, mask):
        if self.modifiers[1] == "commit_group":
            block.copy_groups.append(block.copies)
            block.copies = []
        elif self.modifiers[1] == "wait_group":
            while len(block.copy_groups) > int(self.operands[0]):
                for copy in block.copy_groups.popleft():
                    block.shared.end_copy(*copy)
        else:
            active = block.lanes if mask is None else np.flatnonzero(mask)
            size = int(self.operands[2], 0)
            read = self.read(block, self.operands[3], np.uint32)[active] if len(self.operands) > 3 else np.uint32(size)
            read = np.broadcast_to(read, active.shape)
            data = np.zeros((len(active), size), np.uint8)
            source = self.address(block, self.operands[1])[active]
            for length in np.unique(read[read > 0]):
                some = read == length
                data[some, :length] = block.memory.load(source[some], int(length), block.number)
            target = self.address(block, self.operands[0])[active]
            block.copies.append(block.shared.begin_copy(target, data, block.warps[active]))

    def do_ldmatrix(self, block, mask):
        """8 x 8 matrices of 16-bit numbers; row i of matrix m at the address of lane 8 m + i."""
        self.whole_warps(block, mask)
        targets = split_operands(self.operands[0][1:-1])
        count, warps = len(targets), block.threads // WARP
        lanes = (np.arange(warps)[:, None] * WARP + np.arange(8 * count)).reshape(-1)
        rows = block.shared.load(self.address(block, self.operands[1])[lanes], 16, block.warps[lanes])
        matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(warps, count, 8, 8)
        if "trans" in self.modifiers:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(np.uint32)  # [warps, count, 8, 4]
        for m, target in enumerate(targets):
            block.write(target, pairs[:, m].reshape(-1).copy(), mask)

    def do_stmatrix(self, block, mask):
        """The other way round."""
        self.whole_warps(block, mask)
        sources = split_operands(self.operands[1][1:-1])
        count, warps = len(sources), block.threads // WARP
        active = np.arange(warps) if mask is None else np.flatnonzero(mask.reshape(-1, WARP)[:, 0])
        pairs = np.stack([block.registers[each].view(np.uint32).reshape(warps, 8, 4) for each in sources], axis=1)
        matrices = pairs.view(np.uint16)[active]  # [warps, count, 8, 8]
        if "trans" in self.modifiers:
            matrices = matrices.swapaxes(2, 3)
        lanes = (active[:, None] * WARP + np.arange(8 * count)).reshape(-1)
        data = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
        block.shared.store(self.address(block, self.operands[0])[lanes], data, block.warps[lanes])

    # Matrix products

    def registers_of(self, block, operand):
        """[threads, R] 32-bit registers"""
        return np.stack([block.registers[each].view(np.uint32) for each in split_operands(operand[1:-1])], axis=1)

    def do_mma(self, block, mask):
        """D = A B + C by warp; shape m16 n8 k16 (16-bit) or k8 (tf32)."""
        self.whole_warps(block, mask)
        shape, kind = self.modifiers[2], self.modifiers[6]
        depth = int(shape.split("k")[1])
        a, b, c = (self.registers_of(block, each) for each in self.operands[1:])
        a, b = a_fragment(unpacked(a, kind), depth), b_fragment(unpacked(b, kind), depth)
        numbers = cut_off(c.view(np.float32) + from_accumulator(np.matmul(a, b)))
        for i, target in enumerate(split_operands(self.operands[0][1:-1])):
            block.write(target, numbers[:, i].view(np.uint32).copy(), mask)

    def do_wgmma(self, block, mask):
        if mask is not None:
            raise MachineError("a warp group's instruction that not all threads reach")
        what = self.modifiers[0]
        if what == "commit_group":
            block.product_groups.append(block.products)
            block.products = []
        elif what == "wait_group":
            while len(block.product_groups) > int(self.operands[0]):
                for product in block.product_groups.popleft():
                    self.multiply(block, *product)
        elif what == "mma_async":
            block.products.append(self.prepared(block))

    def prepared(self, block):
        """What a warp group's product reads: registers now, the shared memory when it is computed."""
        shape, kind = self.modifiers[3], self.modifiers[5]
        columns, depth = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
        targets = split_operands(self.operands[0][1:-1])
        itemsize = 4 if kind == "tf32" else 2
        flags = self.operands[4:]
        if self.operands[1][0] == "{":
            a = a_fragment(unpacked(self.registers_of(block, self.operands[1]), kind), depth).reshape(-1, 64, depth)
            transposed = flags[2:] == ["1"]
        else:
            descriptors = block.registers[self.operands[1]].view(np.uint64).reshape(-1, 128)
            a = self.tiles(block, descriptors, 64, depth, itemsize, flags[2:3] == ["1"])
            transposed = flags[3:] == ["1"]
        descriptors = block.registers[self.operands[2]].view(np.uint64).reshape(-1, 128)
        b = self.tiles(block, descriptors, columns, depth, itemsize, transposed)
        keep = np.unique(self.read(block, self.operands[3], np.bool_))
        if len(keep) > 1:
            raise MachineError("threads disagree on whether to add to the accumulator")
        if flags[:2] != ["1", "1"]:
            raise MachineError("negated operands are not known")
        return targets, a, b, kind, keep[0]

    def tiles(self, block, descriptors, rows, depth, itemsize, transposed):
        """Where each warp group's operand lies: byte addresses [groups, rows, depth], noted as read."""
        result = []
        for group, each in enumerate(descriptors):
            if (each != each[0]).any():
                raise MachineError("threads of a warp group have different descriptors")
            addresses = operand_addresses(int(each[0]), rows, depth, itemsize, transposed)
            touched = block.shared.touched(addresses.reshape(-1).astype(np.uint64), itemsize)
            if block.shared.unfenced[touched].any():
                raise MachineError("a product reads what was stored without a proxy fence")
            for warp in range(4 * group, 4 * group + 4):
                block.shared.note_read(touched, np.full(len(touched), warp, np.int16))
            result.append(touched.reshape(rows, depth, itemsize))
        return np.stack(result)

    def multiply(self, block, targets, a, b, kind, keep):
        def fetched(operand):
            if operand.dtype == np.float64:
                return operand
            data = np.ascontiguousarray(block.shared.bytes[operand])
            return unpacked(data.reshape(-1, 4).view(np.uint32), kind).reshape(operand.shape[:-1])

        product = np.matmul(fetched(a), fetched(b).swapaxes(1, 2))  # [groups, 64, columns]
        columns = product.shape[2]
        by_warp = product.reshape(-1, 16, columns // 8, 8).transpose(0, 2, 1, 3)  # [warps, n, 16, 8]
        for n in range(columns // 8):
            numbers = from_accumulator(np.ascontiguousarray(by_warp[:, n]))
            for i, target in enumerate(targets[4 * n : 4 * n + 4]):
                old = block.registers[target].view(np.float32) if keep else np.float32(0)
                block.registers[target] = cut_off(old + numbers[:, i])


def operand_addresses(descriptor, rows, depth, itemsize, transposed):
    """Byte addresses [rows, depth] of a wgmma operand in the shared memory (PTX ISA, "Matrix Descriptor Format").

    Contiguous in the depth, or transposed: contiguous in the rows. A pattern has eight lines of 128, 64 or 32 bytes,
    within which 16-byte pieces change places by the line's number.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    line, swizzle = {1: (128, 7), 2: (64, 3), 3: (32, 1)}.get(descriptor >> 62, (0, 0))
    if not line:
        raise MachineError("operands without swizzling are not known")
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if transposed:
        width = line // itemsize
        addresses = start + row // width * leading + k // 8 * stride + k % 8 * line + row % width * itemsize
    else:
        addresses = start + row // 8 * stride + row % 8 * line + k * itemsize
    return addresses ^ ((addresses >> 7 & swizzle) << 4)


def a_fragment(numbers, depth):
    """[threads, 4 registers' numbers] -> A [warps, 16, depth]."""
    per = depth // 8  # numbers in a register
    numbers = numbers.reshape(-1, 8, 4, 4, per)  # warp, lane // 4, lane % 4, register, number
    a = np.empty((len(numbers), 16, depth))
    for register in range(4):
        rows, start = 8 * (register % 2), register // 2 * (depth // 2)
        a[:, rows : rows + 8, start : start + depth // 2] = numbers[:, :, :, register].reshape(-1, 8, depth // 2)
    return a


def b_fragment(numbers, depth):
    """[threads, 2 registers' numbers] -> B [warps, depth, 8]."""
    numbers = numbers.reshape(-1, 8, 4, 2, depth // 8)  # warp, column, lane % 4, register, number
    return numbers.transpose(0, 3, 2, 4, 1).reshape(-1, depth, 8)


def from_accumulator(product):
    """[warps, 16, 8] -> the four numbers [threads, 4] of each thread."""
    parts = product.reshape(-1, 2, 8, 4, 2)  # warp, half, lane // 4, lane % 4, number
    return parts.transpose(0, 2, 3, 1, 4).reshape(-1, 4)


def split_operands(text):
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text.strip())]


def immediate(text, dtype):
    if text == "global_smem":
        return np.dtype(dtype).type(0)
    if text[:2] == "0f":
        return np.uint32(int(text[2:], 16)).view(np.float32).view(dtype)
    if text[:2] == "0d":
        return np.uint64(int(text[2:], 16)).view(np.float64).view(dtype)
    if dtype == np.bool_:
        return np.bool_(int(text))
    return np.array(int(text.rstrip("U"), 0)).astype(np.int64).astype(dtype)


class Program:
    """A kernel's PTX, read once."""

    def __init__(self, ptx):
        head, _, body = ptx.partition("\n{\n")
        self.threads = int(re.search(r"\.reqntid (\d+)", head).group(1))
        self.parameters = re.findall(r"\.param [^,\n]*?(\w+_param_\d+)", head)
        self.labels, self.code, source = {}, [], ""
        for line in body.partition("\n}\n")[0].splitlines():
            line, _, comment = map(str.strip, line.partition("//"))
            if line.startswith(".loc"):
                source = comment.rpartition(":")[0]  # file:line
            if re.fullmatch(r"[$\w]+:", line):
                self.labels[line[:-1]] = len(self.code)
            elif line and line[0] not in ".{}":
                self.code.append(Instruction(line, self.labels, source))
        self.labels["end"] = len(self.code)

    def run(self, grid, arguments, shared_size):
        """All blocks one after the other; tensors are written in place.

        Returns how many instructions the warps have executed, by line of the source ("file:line"); without `mov`, of
        which the assembler leaves nothing.
        """
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        memory = Memory(tensors)
        values = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        values += [0] * (len(self.parameters) - len(values))  # scratch memory, which these kernels do not use
        values = dict(zip(self.parameters, values, strict=True))
        grid, executed = (*grid, 1, 1)[:3], Counter()
        with np.errstate(all="ignore"):
            for z in range(grid[2]):
                for y in range(grid[1]):
                    for x in range(grid[0]):
                        Block(self, (x, y, z), grid, memory, values, shared_size).run(self.code, executed)
        return executed
