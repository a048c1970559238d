"""One idea for every wrapper: a second face on the user's own object.

[Note: two faces] ``put_on(mixin, original)`` makes an instance of a class that derives from the mixin *and* from the
original's class, and that shares the original's ``__dict__``. So the wrapper is an instance of the user's class,
every attribute that is read or written through one face is there on the other, and the user's own methods and
overrides keep working. What is ours lives in the slots of the mixin, whose names begin with ``_fabric_``, and is
invisible to the user's object. No ``__init__`` runs, and no ``__init_subclass__`` of the user's class is told about
the new class.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fabric_core.errors import WrongTypeError

F = TypeVar("F", bound="Face")


class Face:
    """Base of the mixins: it knows the original, and pickles and copies as the original."""

    __slots__ = ("_fabric_original",)
    _fabric_original: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """What a method of the user's makes by ``type(self)(…)`` is a plain object of the user's class."""
        users: Any = cls.__bases__[1]
        return users(*args, **kwargs)

    def __init_subclass__(cls) -> None:
        """Stop here: a hook of the user's class must not see the classes that are made behind its back."""

    def __del__(self) -> None:
        """Stop here: the clean-up of the user's class is run when the original dies."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return unwrap, (self._fabric_original,)

    def __copy__(self) -> Any:
        import copy

        return copy.copy(self._fabric_original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        return copy.deepcopy(self._fabric_original, memo)

    @classmethod
    def _fabric_body(cls, users: type) -> dict[str, Any]:
        """What else the class of both has, for one class of the user's."""
        return {}


def put_on(mixin: type[F], original: Any) -> F:
    """Give ``original`` a second face.

    Args:
        mixin: A subclass of `Face` that declares ``__slots__``.
        original: The user's object; it is not changed.

    Returns:
        An instance of both ``mixin`` and ``type(original)`` that shares the original's attributes.

    Raises:
        WrongTypeError: The class of ``original`` has a memory layout of its own (``__slots__``).
    """
    key: Any = (mixin, type(original))
    face: F = object.__new__(_class_of_both(*key))
    object.__setattr__(face, "__dict__", original.__dict__)
    object.__setattr__(face, "_fabric_original", original)
    return face


def unwrap(obj: Any) -> Any:
    """The user's own object behind a face; anything else is returned as it is."""
    return obj._fabric_original if isinstance(obj, Face) else obj


def is_wrapped(obj: object) -> bool:
    """Whether an object came out of ``setup``, ``setup_module``, ``setup_optimizers`` or ``setup_dataloaders``."""
    return isinstance(obj, Face)


def _class_of_both(mixin: Any, cls: Any) -> Any:
    """The class that was made before, as long as anybody uses it: a cache would keep the user's class alive."""
    for known in type.__subclasses__(cls):
        if known.__bases__ == (mixin, cls):
            return known
    metaclass: Any = type(cls)
    body = {
        "__slots__": (),
        "__module__": mixin.__module__,
        "__doc__": cls.__doc__,
        **mixin._fabric_body(cls),
    }
    try:
        return metaclass(f"Fabric{cls.__name__}", (mixin, cls), body)
    except TypeError as error:
        raise WrongTypeError(
            f"A {cls.__qualname__} cannot be set up: its class does not allow a subclass that adds to it ({error}). "
            "Wrap it in a plain class that holds it, and set that up."
        ) from error
