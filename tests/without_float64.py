"""A tensor that behaves as on Apple's MPS, which this project's tests have no machine for."""

import torch


class WithoutFloat64(torch.Tensor):
    """A CPU tensor that says it is on MPS, and raises TypeError as MPS does when a result would be
    float64.
    """

    @classmethod
    def hold(cls, values) -> "WithoutFloat64":
        return torch.as_tensor(values).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("mps")
        if function == torch.Tensor.to and args[1] == torch.device("mps"):
            return args[0]
        if function in (torch.Tensor.cpu, torch.Tensor.to):
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        found = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(found, cls) and found.dtype is torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
                "float64"
            )
        return found
