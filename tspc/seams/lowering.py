"""Private symbols of torch: what of Dynamo, AOTAutograd and Inductor lowers a program."""

from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.functional_utils import has_data_mutation
from torch._functorch._aot_autograd.schemas import (
    AOTDispatchCompiler,
    SerializableAOTDispatchCompiler,
)
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_export_joint_simple, aot_module_simplified
from torch._functorch.partitioners import (
    default_partition,
    min_cut_rematerialization_partition,
    must_recompute,
)
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.codecache import FxGraphCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
from torch._inductor.lowering import make_pointwise, register_lowering
from torch._inductor.output_code import OutputCode
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V
from torch._inductor.virtualized import ops as inductor_ops

__all__ = [
    "AOTDispatchCompiler",
    "ConstantSource",
    "CustomGraphPass",
    "FxGraphCache",
    "OutputCode",
    "SerializableAOTDispatchCompiler",
    "TorchDynamoException",
    "TracingContext",
    "V",
    "aot_export_joint_simple",
    "aot_module_simplified",
    "cache_dir",
    "compile_fx",
    "compile_fx_inner",
    "counters",
    "default_partition",
    "functorch_config",
    "has_data_mutation",
    "inductor_config",
    "inductor_ops",
    "list_mode_options",
    "make_boxed_func",
    "make_pointwise",
    "min_cut_rematerialization_partition",
    "must_recompute",
    "preserve_node_ordering",
    "register_lowering",
    "select_decomp_table",
    "tracing",
]
