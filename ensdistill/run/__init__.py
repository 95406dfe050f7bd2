"""A whole job: teachers, students, evaluation, tables."""
