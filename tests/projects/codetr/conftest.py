"""The project's package is importable from a checkout that was installed before it was there."""

from d2dense import projects

projects.import_all()
