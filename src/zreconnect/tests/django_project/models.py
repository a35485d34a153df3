from django.db import models


class File(models.Model):
    path = models.CharField(max_length=200, unique=True)


class Definition(models.Model):
    file = models.ForeignKey(File, models.CASCADE)
    name = models.CharField(max_length=200)
