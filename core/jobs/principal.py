"""Who asks: the user behind an API key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["admin", "user"]


@dataclass(frozen=True)
class Principal:
    """The caller of a request."""

    key_id: str
    user: str
    role: Role

    @property
    def is_admin(self) -> bool:
        """Admins see and do everything."""
        return self.role == "admin"
