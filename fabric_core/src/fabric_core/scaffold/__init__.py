"""``fabric plugins new``: the files of a complete distribution with one part, which works as it is made.

`naming` says what everything is called, `kinds` what there is to make, `terms` under which licence, `rendering` fills
the templates in, and `placing` puts the files in their place, all or none. The templates are data: ``templates/common``
for every kind, and a folder per kind; each is named as the file that it becomes, with ``.txt`` behind.
"""

from __future__ import annotations

from fabric_core.scaffold.making import Made, make_plugin

__all__ = ["Made", "make_plugin"]
