"""Makes LEAML known to PEFT: one new member of its closed enumeration, one registration, once in a process.

PEFT has no entry point for methods from outside. Its ``PeftType`` is an enumeration that ``register_peft_method``
checks and of which transformers reads ``.value``, so a real member is added: picklable, deep-copyable, found by name,
by value and by attribute. Where the package is installed, a start-up hook imports ``leaml_plugin.tuner`` after
``peft`` (``leaml_plugin_startup``). A process without the hook does not know the method before it imports
``leaml_plugin.tuner`` itself, and fails with ``KeyError: 'LEAML'`` when it loads an adapter.
"""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method

NAME = "LEAML"


def add_member(name: str) -> PeftType:
    """The member ``name`` of ``PeftType``, added where it is not there yet."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13: what `value in PeftType` looks at
        PeftType._hashable_values_.append(name)
    type.__setattr__(PeftType, name, member)
    return member


def register() -> None:
    """Register the config and model classes; does nothing the second time."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from leaml_plugin.tuner.config import LeamlConfig
    from leaml_plugin.tuner.model import LeamlModel

    if add_member(NAME) in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(name=NAME.lower(), config_cls=LeamlConfig, model_cls=LeamlModel)
