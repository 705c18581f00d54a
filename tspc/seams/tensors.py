"""Private symbols of torch: ops, tensors that stand for others, trees of values."""

import torch
from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass, DispatchKey
from torch._C import _current_graph_task_id as current_backward
from torch._C import _DisableAutocast as DisableAutocast
from torch._C import _disabled_torch_function_impl as no_torch_function
from torch._C import _dispatch_has_kernel_for_dispatch_key as has_kernel
from torch._C import _has_storage as has_storage
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    dispatch_functionalize,
)
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.utils._filelock import FileLock
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._python_dispatch import _disable_current_modes as no_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

make_subclass = torch.Tensor._make_subclass
make_wrapper = torch.Tensor._make_wrapper_subclass

__all__ = [
    "DTensorSpec",
    "DataDependentOutputException",
    "DisableAutocast",
    "DisableTorchFunction",
    "DisableTorchFunctionSubclass",
    "DispatchKey",
    "FakeTensor",
    "FakeTensorMode",
    "FileLock",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "HigherOrderOperator",
    "IncompatibleKeys",
    "OpOverload",
    "OpOverloadPacket",
    "OrderedSet",
    "TensorMeta",
    "TorchDispatchMode",
    "current_backward",
    "dispatch_functionalize",
    "enter_autocast",
    "exit_autocast",
    "has_kernel",
    "has_storage",
    "no_modes",
    "no_torch_function",
    "return_and_correct_aliasing",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "make_subclass",
    "make_wrapper",
    "unset_fake_temporarily",
]
