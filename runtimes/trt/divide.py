"""Division of a float32 buffer by a number, on the GPU: the latents on their way into the VAE.

The VAE's graph takes latents already divided by the scaling factor (the bundle's contract, which
is optimum's). Through the host that would cut the one CUDA graph in two; inside an engine it would
change the graph that the engine's identity and refitting rest on. So it is its own kernel, 256
numbers a block. PTX is text that every NVIDIA driver compiles for its own GPU, so nothing is needed
beyond the driver; the division is IEEE's, so the result equals numpy's bit for bit.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ..cuda_device import Cuda, DeviceBuffer, Stream

_BLOCK = 256
# void divide(float *out, const float *in, float divisor, unsigned count)
# PTX 7.0 and sm_52 are older than any driver or GPU that TensorRT 10.3 runs on.
PTX = """
.version 7.0
.target sm_52
.address_size 64

.visible .entry divide(
    .param .u64 out, .param .u64 in, .param .f32 divisor, .param .u32 count)
{
    .reg .pred  %outside;
    .reg .b32   %block, %width, %thread, %index, %end;
    .reg .b64   %offset, %source, %target;
    .reg .f32   %value, %by;

    mov.u32         %block, %ctaid.x;
    mov.u32         %width, %ntid.x;
    mov.u32         %thread, %tid.x;
    mad.lo.u32      %index, %block, %width, %thread;
    ld.param.u32    %end, [count];
    setp.ge.u32     %outside, %index, %end;
    @%outside ret;

    mul.wide.u32    %offset, %index, 4;
    ld.param.u64    %source, [in];
    cvta.to.global.u64 %source, %source;
    add.u64         %source, %source, %offset;
    ld.global.f32   %value, [%source];
    ld.param.f32    %by, [divisor];
    div.rn.f32      %value, %value, %by;
    ld.param.u64    %target, [out];
    cvta.to.global.u64 %target, %target;
    add.u64         %target, %target, %offset;
    st.global.f32   [%target], %value;
    ret;
}
"""


class Divide:
    """The kernel, compiled by the driver for this GPU."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        purpose = "the kernel that scales the latents"
        self._module = cuda.call("cuModuleLoadData", PTX.encode() + b"\0", purpose=purpose)
        self._function = cuda.call("cuModuleGetFunction", self._module, b"divide")

    def enqueue(
        self, stream: Stream, target: DeviceBuffer, source: DeviceBuffer, divisor: float
    ) -> None:
        """Enqueue target = source / divisor over float32 buffers of equal size."""
        count = source.size_bytes // 4
        values: tuple[Any, ...] = (
            ctypes.c_void_p(target.pointer),
            ctypes.c_void_p(source.pointer),
            ctypes.c_float(divisor),
            ctypes.c_uint32(count),
        )
        # The driver copies the arguments before it returns.
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        blocks = -(-count // _BLOCK)
        self._cuda.call(
            "cuLaunchKernel",
            self._function,
            *(blocks, 1, 1),
            *(_BLOCK, 1, 1),
            0,
            stream.handle,
            ctypes.addressof(pointers),
            0,
        )

    def close(self) -> None:
        """Unload the kernel; a second call does nothing."""
        module, self._module = self._module, None
        if module is not None:
            self._cuda.release("cuModuleUnload", module)
