"""The controlled experiment: versions of one model, trained side by side, and what that shows.

``variants``, ``models`` and ``datasets`` say what can be studied, ``checks`` what is refused.
``settings`` is what was asked for, in a form that can be compared; ``identity`` hashes the code in
it, and ``plan`` is all functions as one parcel for other processes. ``trial`` is one training,
``measure`` what it costs. ``pool`` sees trials through, which ``local`` runs in processes
(``worker`` is one, ``worker_output`` what it prints), ``here`` in this one, and ``ray_tasks`` on a
cluster; ``live`` shows them. ``folder`` says what lies where on disk, ``lock`` who may write there,
``load_and_merge`` reads and merges folders. ``analysis`` compares, by the tests in ``equivalence``,
``sign_flips`` and ``power``; ``verdict`` says it in words, ``surprises`` what was not as it should
be. ``experiment`` is the whole of it.
"""

from __future__ import annotations

from truenorm._study.experiment import POSITIONS, study
from truenorm._study.pool import Progress
from truenorm._study.variants import Variant

__all__ = ["POSITIONS", "Progress", "Variant", "study"]
